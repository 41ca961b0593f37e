"""Where the tokens of one step lie: positions, cache slots, and each row's share of the flat token
axis.

Everything that all layers share is worked out here once per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate

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


class Group:
    """Rows of one length, computed together. `tokens` (B * N,) are their places among all tokens,
    `positions` is (B, N).
    """

    def __init__(self, spans: Sequence[Span], places: Sequence[int], plan: StepPlan) -> None:
        self._spans, self._page_size = spans, plan.page_size
        self._contexts: dict[int | None, tuple[Tensor, Tensor]] = {}
        device = plan.slots.device
        self.tokens = torch.tensor(
            [at + n for span, at in zip(spans, places, strict=True) for n in range(span.count)],
            device=device,
        )
        self.positions = plan.positions[self.tokens].view(len(spans), -1)

    def context(self, window: int | None, block: int) -> tuple[Tensor, Tensor]:
        """What layers with this window look at: the first position (B,), a multiple of `block`, and
        the slots (B, S) from there on, S a multiple too; any slot stands where there is no token.
        """
        if window not in self._contexts:
            self._contexts[window] = self._slots(window, block)
        return self._contexts[window]

    def _slots(self, window: int | None, block: int) -> tuple[Tensor, Tensor]:
        firsts = [
            0 if window is None else max(0, span.start - window + 1) // block * block
            for span in self._spans
        ]
        longest = max(span.stop - first for span, first in zip(self._spans, firsts, strict=True))
        places = -(-longest // block) * block
        device = self.positions.device
        offsets = torch.arange(places, device=device)
        rows = []
        for span, first in zip(self._spans, firsts, strict=True):
            at = (offsets + first).clamp_(max=span.stop - 1)
            rows.append(at + span.base if span.pages is None else self._paged(span.pages, at))
        return torch.tensor(firsts, device=device), torch.stack(rows)

    def _paged(self, pages: Tensor, at: Tensor) -> Tensor:
        slots = pages[at // self._page_size] * self._page_size + at % self._page_size
        return slots.clamp_(min=0)  # pages that no window reaches may be gone


@dataclass(frozen=True, slots=True)
class StepPlan:
    """`positions` and `slots` are (T,) int64; `masks` remembers masks for the layers to come."""

    page_size: int
    pages: list[Sequence[int]]  # of each row, as far as its tokens reach
    spans: list[Span]
    counts: list[int]
    positions: Tensor
    slots: Tensor
    masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)
    _groups: list[Group] = field(default_factory=list)

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
        pages = [row.pages[: -(-row.stop // page_size)] for row in rows]
        return cls(page_size, pages, spans, [row.count for row in rows], both[0], both[1])

    def groups(self) -> list[Group]:
        """Rows of one token all together, longer ones one by one; in the order of tokens."""
        if not self._groups:
            at = list(accumulate(self.counts, initial=0))
            single = [index for index, count in enumerate(self.counts) if count == 1]
            longer = [[index] for index, count in enumerate(self.counts) if count > 1]
            for rows in sorted([single, *longer] if single else longer):
                spans = [self.spans[row] for row in rows]
                self._groups.append(Group(spans, [at[row] for row in rows], self))
        return self._groups

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
    """None when the pages are neighbours in order; else their numbers, -1 for those given back."""
    if pages[0] >= 0 and all(page == pages[0] + index for index, page in enumerate(pages)):
        return None
    return torch.tensor(pages, device=device)
