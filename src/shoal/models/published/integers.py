"""Integers of few bits, several in a 32-bit word, with a scale for each group of columns."""

# N rows (outputs) · K columns (inputs) · G groups of columns

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import UnsupportedModel


@dataclass(frozen=True, slots=True)
class Grouped:
    """A weight is (code - zero of its group) * scale of its group."""

    codes: Tensor  # (N, K) int8: -8..7 with 4 bits, -128..127 with 8
    scales: Tensor  # (N, G) float32
    zeros: Tensor | None  # (N, G) int8 like codes; None when all are 0
    group: int  # columns of a group
    order: Tensor | None = None  # (K,) the group of each column, where they do not just follow

    def floats(self) -> Tensor:
        """(N, K) float32."""
        if self.order is not None:
            return self._spread(self.order.long())
        rows, columns = self.codes.shape
        if columns % self.group:
            return self._spread(torch.arange(columns) // self.group)
        values = self.codes.float().view(rows, -1, self.group)
        if self.zeros is not None:
            values.sub_(self.zeros[..., None])
        return values.mul_(self.scales[..., None]).view(rows, columns)

    def _spread(self, group_of: Tensor) -> Tensor:
        values = self.codes.float()
        if self.zeros is not None:
            values.sub_(self.zeros[:, group_of])
        return values.mul_(self.scales[:, group_of])


def nibbles(stored: Tensor) -> Tensor:
    """Of each byte of the last axis the low half, then the high one: (..., B) -> (..., 2 B)."""
    return torch.stack((stored & 15, stored >> 4), -1).flatten(-2)


def unpack(words: Tensor, bits: int) -> Tensor:
    """int32 (..., W) -> uint8 (..., W * 32 / bits), the lowest bits first. `bits` is 4 or 8."""
    held = words.contiguous().view(torch.uint8)
    return nibbles(held) if bits == 4 else held


def signed(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes around their middle -> int8."""
    return (codes.to(torch.int16) - (1 << bits - 1)).to(torch.int8)


def or_none(zeros: Tensor) -> Tensor | None:
    return zeros if bool(zeros.any()) else None


def order_of(stored: Tensor | None, group: int, groups: int) -> Tensor | None:
    """None when each group is a run of columns. Raises UnsupportedModel for groups that are not."""
    if stored is None or bool((stored == -1).any()):  # -1: declared, but never used
        return None
    if bool(((stored < 0) | (stored >= groups)).any()):
        raise UnsupportedModel(
            f"a column names a group beyond the {groups} there are",
            hint="download the checkpoint again",
        )
    follows = torch.arange(len(stored), dtype=stored.dtype) // group
    return None if torch.equal(stored, follows) else stored
