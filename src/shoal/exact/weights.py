"""Weights of a linear layer as small integers: 8 bits each, or 4 bits in groups of 32.

Both are an int8 matrix with one float scale for each output, so that a product with 8-bit
activations is an integer sum. Of the 4-bit form, a group's scale is a whole multiple of its row's:
weight[n, k] = table[code[n, k]] * multiplier[n, k // 32] * scale[n].

N outputs · K inputs · G = ceil(K / 32) groups
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import native
from .numbers import TINIEST, divided

LARGEST = 127
GROUP = 32
LARGEST_CODE, LARGEST_MULTIPLIER = 7, 18  # 7 * 18 is 126: the expanded weights fit 8 bits
UNIT = 256  # parts of the smallest step, in which errors are counted
CANDIDATES = 4  # multipliers that are tried for a group
INT4_TABLE = tuple(range(-8, 8))
FP4_TABLE = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # E2M1, twice its value
ROWS_AT_ONCE = 128  # so that what is computed of them stays in the cache


@dataclass(frozen=True, slots=True, eq=False)
class Int8Weight:
    """codes (N, K) int8 in -127..127, scale (N,) float32."""

    codes: Tensor
    scale: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def to(self, device: torch.device) -> Int8Weight:
        return Int8Weight(self.codes.to(device), self.scale.to(device))


@dataclass(frozen=True, slots=True, eq=False)
class Int4Weight:
    """codes (N, K) uint8 in 0..15, multipliers (N, G) uint8 from 1, scale (N,) float32."""

    codes: Tensor
    multipliers: Tensor
    scale: Tensor
    table: tuple[int, ...] = INT4_TABLE

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def to(self, device: torch.device) -> Int4Weight:
        codes, multipliers = self.codes.to(device), self.multipliers.to(device)
        return Int4Weight(codes, multipliers, self.scale.to(device), self.table)

    def expanded(self) -> Int8Weight:
        """The same matrix with 8 bits a weight."""
        table = torch.tensor(self.table, dtype=torch.int8)
        inputs = self.codes.shape[1]
        multipliers = self.multipliers.to(torch.int8).repeat_interleave(GROUP, 1)[:, :inputs]
        return Int8Weight(table[self.codes.long()].mul_(multipliers), self.scale)


Weight = Int8Weight | Int4Weight


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, K) float32 -> codes (M, K) uint8 in 1..255, scale (M, 1); x ~ (codes - 128) * scale."""
    scale = divided(x.abs().amax(1, keepdim=True).clamp_(min=TINIEST), LARGEST)
    return (x / scale).add_(128.5).to(torch.uint8), scale  # adding 0.5 and cutting rounds


def quantise_int8(weight: Tensor) -> Int8Weight:
    """weight (N, K) of any float dtype, rounded with one scale for each row."""
    blocks = [_int8_block(block.float()) for block in torch.split(weight, ROWS_AT_ONCE)]
    codes, scale = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    return Int8Weight(codes, scale)


def _int8_block(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = divided(weight.abs().amax(1).clamp_(min=TINIEST), LARGEST)
    return (weight / scale[:, None]).round_().to(torch.int8), scale


def quantise_int4(weight: Tensor) -> Int4Weight:
    """weight (N, K) of any float dtype; each group takes the multiplier with the least error.

    Errors are compared as whole numbers: every machine makes the same weights of a checkpoint.
    """
    rounded = _int4_block
    library = native.load() if weight.device.type == "cpu" else None
    if library is not None:
        rounded = library.round4
    blocks = [rounded(block.float().contiguous()) for block in torch.split(weight, ROWS_AT_ONCE)]
    codes, multipliers, scale = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    return Int4Weight(codes, multipliers, scale)


def _int4_block(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    inputs = weight.shape[1]
    part = weight.abs().amax(1).clamp_(min=TINIEST).div_(LARGEST_CODE * LARGEST_MULTIPLIER * UNIT)
    parts = pad((weight / part[:, None]).round_(), (0, -inputs % GROUP))
    groups = parts.view(len(weight), -1, GROUP)
    whole = groups.abs().amax(2).div_(LARGEST_CODE * UNIT).ceil_()  # cuts nothing off
    best_error, multipliers = torch.full_like(whole, torch.inf, dtype=torch.float64), whole
    for less in range(CANDIDATES):  # a finer step for all may be worth cutting the largest
        tried = (whole - less).clamp_(min=1)
        error = _int4_error(groups, tried)
        multipliers = torch.where(error < best_error, tried, multipliers)
        best_error = torch.minimum(error, best_error)
    codes = _int4_codes(groups, multipliers).add_(8).to(torch.uint8)
    codes = codes.flatten(1)[:, :inputs].contiguous()
    return codes, multipliers.to(torch.uint8), part * UNIT


def _int4_codes(groups: Tensor, multipliers: Tensor) -> Tensor:
    steps = (multipliers * UNIT)[..., None]
    return (groups / steps).round_().clamp_(-LARGEST_CODE, LARGEST_CODE)


def _int4_error(groups: Tensor, multipliers: Tensor) -> Tensor:
    """(N, G) float64: the squared error in whole parts, exact."""
    steps = (multipliers * UNIT)[..., None]
    miss = _int4_codes(groups, multipliers).mul_(steps).sub_(groups)
    return miss.double().square_().sum(2)
