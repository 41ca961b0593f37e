"""Rows with a history, cached twice: as the plain form wants it, and in scattered pages."""

# T new tokens, all rows together · K kv heads · D width of queries and keys · W of values
# ruff: noqa: N803 - the letters at the end of a tensor's name are its axes

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shoal.exact.attention import BLOCK, Context, Scores, attend
from shoal.exact.layer import Angles
from shoal.exact.native_layer import NativeStep, Pools
from shoal.exact.numbers import round_rows

Span = tuple[int, int]  # first position, count of new tokens


def pools(slots: int, kv_heads: int, width: int, value_width: int | None = None) -> Pools:
    """Filled with what must never be read."""
    value_width = value_width or width
    return Pools(
        torch.full((slots, kv_heads, width), 2047, dtype=torch.int16),
        torch.full((slots, kv_heads), torch.nan),
        torch.full((slots, kv_heads, value_width), -2047, dtype=torch.int16),
        torch.full((slots, kv_heads), torch.nan),
    )


@dataclass
class Pages:
    """Where each row's tokens lie: pages in no order at all."""

    rows: int
    per_row: int
    page_size: int
    seed: int = 0
    of_row: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        order = list(range(self.rows * self.per_row))
        random.Random(self.seed).shuffle(order)
        self.of_row = [order[row :: self.rows] for row in range(self.rows)]

    @property
    def slots(self) -> int:
        return self.rows * self.per_row * self.page_size

    def step(self, spans: Sequence[Span], angles: Sequence[Angles] = ()) -> NativeStep:
        slots = [
            self.of_row[row][p // self.page_size] * self.page_size + p % self.page_size
            for row, (start, count) in enumerate(spans)
            for p in range(start, start + count)
        ]
        starts, counts = zip(*spans, strict=True)
        into = torch.tensor(slots, dtype=torch.int64)
        return NativeStep(starts, counts, self.of_row, self.page_size, into, angles)


class Plain:
    """The plain form: each row attends alone, over keys and values that lie one after another."""

    def __init__(self, rows: int) -> None:
        self.cached: list[list[Tensor]] = [[] for _ in range(rows)]
        self.spans: Sequence[Span] = []

    def __call__(self, q_THD: Tensor, k_TKD: Tensor, v_TKW: Tensor, how: Scores) -> Tensor:
        sizes = [count for _, count in self.spans]
        of_rows = zip(*(torch.split(x, sizes) for x in (q_THD, k_TKD, v_TKW)), strict=True)
        parts = [
            self._row(row, span[0], q, k, v, how)
            for row, (span, (q, k, v)) in enumerate(zip(self.spans, of_rows, strict=True))
            if span[1]
        ]
        return torch.cat(parts)

    def _row(self, row: int, start: int, q: Tensor, k: Tensor, v: Tensor, how: Scores) -> Tensor:
        new = [*round_rows(k), *round_rows(v)]
        old = self.cached[row]
        now = [torch.cat(pair) for pair in zip(old, new, strict=True)] if old else new
        self.cached[row] = now
        keys, key_scale, values, value_scale = (_whole_blocks(x)[None] for x in now)
        first = torch.zeros(1, dtype=torch.int64)
        context = Context(first, keys.short(), key_scale, values.short(), value_scale)
        positions = torch.arange(start, start + len(q))[None]
        return attend(q[None], positions, context, how)[0]


def _whole_blocks(x: Tensor) -> Tensor:
    missing = -len(x) % BLOCK
    return torch.cat((x, x.new_zeros(missing, *x.shape[1:])))


def angles_at(spans: Sequence[Span], half: int, base: float = 10000.0) -> Angles:
    positions = [p for start, count in spans for p in range(start, start + count)]
    steps = base ** -(torch.arange(half) / max(1, half))
    turns = torch.tensor(positions, dtype=torch.float32)[:, None] * steps
    return Angles(turns.cos(), turns.sin())
