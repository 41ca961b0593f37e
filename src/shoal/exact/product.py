"""Sums of products of 8-bit integers, exact on every machine, as fast as torch allows there.

All three ways return float32(sum over k of (codes[m, k] - 128) * weights[n, k]) * scale[n] with the
same bits. Which one is right and fastest depends on the processor: those without 8-bit dot products
(VNNI) add pairs of products in 16 bits, saturate, and are silently wrong. A self-test decides; no
table of processors does.
"""

# M rows · K inputs · N outputs · codes (M, K) uint8 around 128 · weights (N, K) int8, never -128

from __future__ import annotations

import functools
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812 (its name everywhere)
from torch import Tensor

from .weights import GROUP, Int4Weight

ZERO = 128  # the code of 0.0
LARGEST_K = 66_000  # 255 * 127 * K stays below 2**31


class Product(Protocol):
    """Holds the weights of one linear layer and multiplies codes with them: (M, K) -> (M, N)."""

    def __call__(self, codes: Tensor) -> Tensor: ...


class OneCall:
    """oneDNN's linear: exact where the processor adds 8-bit products in 32 bits."""

    def __init__(self, weights: Tensor, scale: Tensor) -> None:
        self._packed, self._scale = _packed(weights), scale
        self._zeros = _zeros(weights)

    def __call__(self, codes: Tensor) -> Tensor:
        return _onednn(codes, ZERO, self._packed, self._scale, self._zeros)


class TwoCalls:
    """oneDNN's linear on code // 2 and on code % 2: 7-bit pairs never saturate in 16 bits.

    Blocks of 2048 inputs keep each sum below 2**24, so the float32 that oneDNN returns is exact.
    """

    BLOCK = 2048

    def __init__(self, weights: Tensor, scale: Tensor) -> None:
        self._packed = [_packed(block) for block in torch.split(weights, self.BLOCK, 1)]
        self._scale, self._ones = scale, torch.ones_like(scale)
        self._zeros = _zeros(weights)

    def __call__(self, codes: Tensor) -> Tensor:
        total = torch.zeros(len(codes), len(self._scale), dtype=torch.float64)
        for block, packed in zip(torch.split(codes, self.BLOCK, 1), self._packed, strict=True):
            halves = _onednn(block >> 1, ZERO // 2, packed, self._ones, self._zeros)
            rests = _onednn(block & 1, 0, packed, self._ones, self._zeros)
            total.add_(halves, alpha=2).add_(rests)
        return total.float().mul_(self._scale)


class AnyDevice:
    """Plain torch: CUDA's integer product where the sums fit it, else exact in float64 (slow)."""

    def __init__(self, weights: Tensor, scale: Tensor) -> None:
        self._weights, self._scale = weights, scale

    def __call__(self, codes: Tensor) -> Tensor:
        return sums(codes, self._weights).float().mul_(self._scale)


class Expanding:
    """4-bit weights on a GPU, where memory is dear: expanded to 8 bits for each product."""

    ROWS = 4096  # at a time

    def __init__(self, weight: Int4Weight) -> None:
        self._packed = packed_4_bits(weight.codes)
        self._multipliers, self._scale = weight.multipliers.to(torch.int8), weight.scale
        device = weight.codes.device
        self._table = torch.tensor(weight.table, dtype=torch.int8, device=device)
        self._inputs = weight.shape[1]
        kept = self._packed, self._multipliers, self._scale
        self.nbytes = sum(tensor.nbytes for tensor in kept)

    def __call__(self, codes: Tensor) -> Tensor:
        blocks = zip(
            torch.split(self._packed, self.ROWS),
            torch.split(self._multipliers, self.ROWS),
            strict=True,
        )
        parts = [sums(codes, self._expanded(*block)) for block in blocks]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return joined.float().mul_(self._scale)

    def _expanded(self, packed: Tensor, multipliers: Tensor) -> Tensor:
        """(rows, K) int8."""
        pairs = torch.stack((packed & 15, packed >> 4), 2).flatten().int()
        values = self._table.index_select(0, pairs).view(len(packed), -1, GROUP)
        return values.mul_(multipliers[..., None]).flatten(1)[:, : self._inputs]


def packed_4_bits(codes: Tensor) -> Tensor:
    """(N, K) uint8 in 0..15 -> (N, K / 2), K filled up to whole groups; of two the first is in the
    low bits.
    """
    filled = F.pad(codes, (0, -codes.shape[1] % GROUP))
    return filled[:, ::2] | (filled[:, 1::2] << 4)


def sums(codes: Tensor, weights: Tensor) -> Tensor:
    """(M, N) whole numbers, of a type that depends on the device."""
    fits = weights.shape[1] <= LARGEST_K
    return (by_int_mm if codes.is_cuda and fits else by_float64)(codes, weights)


def by_float64(codes: Tensor, weights: Tensor) -> Tensor:
    """(M, N) float64, exact: the sums stay far below 2**53."""
    return (codes.double() - ZERO) @ weights.double().t()


def by_int_mm(codes: Tensor, weights: Tensor) -> Tensor:
    """(M, N) int32. CUDA wants more than 16 rows, and widths that are multiples of 8: filled up."""
    signed = codes.bitwise_xor(ZERO).view(torch.int8)  # code - 128
    rows, (outputs, inputs) = len(codes), weights.shape
    signed = F.pad(signed, (0, -inputs % 8, 0, max(0, 32 - rows)))
    if inputs % 8 or outputs % 8:
        weights = F.pad(weights, (0, -inputs % 8, 0, -outputs % 8))
    return torch._int_mm(signed, weights.contiguous().t())[:rows, :outputs]


def product_for(weights: Tensor, scale: Tensor) -> Product:
    """The fastest exact way for these weights (N, K) on their device; scale is (N,) float32."""
    if weights.device.type != "cpu" or weights.shape[1] > LARGEST_K:
        return AnyDevice(weights, scale)
    if is_exact(OneCall):
        return OneCall(weights, scale)
    return TwoCalls(weights, scale) if is_exact(TwoCalls) else AnyDevice(weights, scale)


@functools.cache
def is_exact(way: type[Product]) -> bool:
    """Self-test on this processor, once: False when a sum is wrong or torch lacks the kernel."""
    try:
        return all(_agrees(way, *shape) for shape in ((2, 256, 64), (1, 577, 131), (33, 577, 131)))
    except (AttributeError, RuntimeError):
        return False


def _agrees(way: Any, rows: int, inputs: int, outputs: int) -> bool:
    """Compare with 64-bit integers where it is hardest: codes and weights at their largest."""
    codes = torch.full((rows, inputs), 255, dtype=torch.uint8)
    weights = torch.full((outputs, inputs), 127, dtype=torch.int8)
    codes[:, ::7], weights[:, ::5] = 1, -127
    scale = torch.ones(outputs)
    return torch.equal(way(weights, scale)(codes), by_float64(codes, weights).float())


def _packed(weights: Tensor) -> Tensor:
    """In oneDNN's own layout. Opaque: cannot be saved or copied."""
    packed: Tensor = torch.ops.onednn.qlinear_prepack(weights.contiguous(), None)
    return packed


def _zeros(weights: Tensor) -> Tensor:
    return torch.zeros(len(weights), dtype=torch.int32)


def _onednn(codes: Tensor, zero: int, packed: Tensor, scale: Tensor, zeros: Tensor) -> Tensor:
    # Unsigned codes, always: signed ones fall to a reference kernel hundreds of times slower.
    result: Tensor = torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, zero, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return result
