"""Where the tokens of one step lie: positions, cache slots, and each row's share of the flat token
axis.

Everything that all layers share is worked out here once per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from .rows import Row


@dataclass(frozen=True, slots=True)
class Span:
    """One row: `count` new tokens after `start` cached ones.

    `base` is the first slot when the session's pages are neighbours; else `pages` (a tensor) says
    where to gather.
    """

    start: int
    count: int
    stop: int
    base: int
    pages: Tensor | None


@dataclass(frozen=True, slots=True)
class StepPlan:
    """`positions` and `slots` are (T,) int64; `masks` remembers masks for the layers to come."""

    spans: list[Span]
    counts: list[int]
    positions: Tensor
    slots: Tensor
    masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Sequence[Row], page_size: int, device: torch.device) -> StepPlan:
        """Raises ValueError when a row outgrows its pages."""
        positions: list[int] = []
        slots: list[int] = []
        spans: list[Span] = []
        for row in rows:
            span = _span(row, page_size, device)
            spans.append(span)
            mine = range(row.start, span.stop)
            positions += mine
            if span.pages is None:
                slots += range(span.base + row.start, span.base + span.stop)
            else:
                pages = row.pages
                slots += [pages[at // page_size] * page_size + at % page_size for at in mine]
        both = torch.tensor([positions, slots], device=device)
        return cls(spans, [row.count for row in rows], both[0], both[1])

    def mask(self, count: int, context: int, window: int | None) -> Tensor:
        """(count, context) bool, True where the last `count` of `context` tokens may look."""
        key = (count, context, window)
        if key not in self.masks:
            seen = torch.ones(count, context, dtype=torch.bool, device=self.slots.device)
            before = context - count
            seen.tril_(before)
            if window is not None:
                seen.triu_(before - window + 1)
            self.masks[key] = seen
        return self.masks[key]


def _span(row: Row, page_size: int, device: torch.device) -> Span:
    stop = row.start + row.count
    if row.count < 1 or row.start < 0 or stop > len(row.pages) * page_size:
        raise ValueError(f"tokens {row.start}:{stop} do not fit into {len(row.pages)} pages")
    scattered = _scattered(tuple(row.pages), device)
    if scattered is None:
        return Span(row.start, row.count, stop, row.pages[0] * page_size, None)
    return Span(row.start, row.count, stop, -1, scattered[: -(-stop // page_size)])


@lru_cache(maxsize=512)  # sessions at a time; an entry may have thousands of pages
def _scattered(pages: tuple[int, ...], device: torch.device) -> Tensor | None:
    """None when the pages are neighbours in order, the usual case; else their numbers."""
    if all(page == pages[0] + index for index, page in enumerate(pages)):
        return None
    return torch.tensor(pages, device=device)
