"""Where the tokens of one step lie: positions, cache slots, and each row's share of the flat token
axis.

Everything that all layers share is worked out here once per step, and goes to the device in one
copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, chain, pairwise

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


@dataclass(slots=True)
class Group:
    """B rows of `count` tokens, computed together. `tokens` (B * count,) are their places among
    all, `positions` is (B, count); `starts` and `bases` are (B, 1).

    `table` (B, P) are the rows' pages; without one they are neighbours from slot `bases` on.
    """

    page_size: int
    count: int
    longest: int  # context
    tokens: Tensor
    positions: Tensor
    starts: Tensor
    bases: Tensor
    table: Tensor | None
    spans: Sequence[Span] = ()  # none where shapes alone are known
    _contexts: dict[int | None, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _seen: dict[int | None, Tensor] = field(default_factory=dict)

    @property
    def evenly_long(self) -> bool:
        """Whether filling up contexts to the longest does not waste much."""
        total = sum(span.stop for span in self.spans)
        return not self.spans or len(self.spans) * self.longest <= MOST_WASTE * total

    def context(self, window: int | None, block: int) -> tuple[Tensor, Tensor]:
        """What layers with this window look at: the first position (B,), a multiple of `block`, and
        the slots (B, S) from there on, S a multiple too; any slot stands where there is no token.
        """
        if window not in self._contexts:
            self._contexts[window] = self._slots(window, block)
        return self._contexts[window]

    def seen(self, window: int | None, block: int) -> Tensor:
        """(B, S) bool, of rows of one token: True where there is one that they may look at."""
        if window not in self._seen:
            first, slots = self.context(window, block)
            at = first[:, None] + torch.arange(slots.shape[1], device=slots.device)
            seen = at <= self.positions
            self._seen[window] = seen if window is None else seen & (at > self.positions - window)
        return self._seen[window]

    def _slots(self, window: int | None, block: int) -> tuple[Tensor, Tensor]:
        longest, first = self.longest, torch.zeros_like(self.starts)
        if window is not None:
            longest = min(longest, window + self.count + block - 2)
            first = (self.starts - window + 1).clamp_(min=0) // block * block
        places = torch.arange(-(-longest // block) * block, device=first.device)
        at = (first + places).minimum(self.starts + (self.count - 1))
        if self.table is None:
            return first[:, 0], at.add_(self.bases)
        pages = self.table.gather(1, at // self.page_size)
        slots = pages.mul_(self.page_size).add_(at % self.page_size)
        return first[:, 0], slots.clamp_(min=0)  # pages that no window reaches may be gone


MOST_WASTE = 4  # times as many places as tokens

Masks = dict[tuple[int, int, int | None], Tensor]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """`positions` and `slots` are (T,) int64, as are `ids` (T,) of rows that bring them, and
    `wanted` (R,), the tokens after which logits are wanted. `masks` remembers masks for the layers
    to come.
    """

    page_size: int
    pages: list[Sequence[int]]  # of each row, as far as its tokens reach
    spans: list[Span]
    counts: list[int]
    positions: Tensor
    slots: Tensor
    ids: Tensor
    wanted: Tensor
    highest: int  # position, or above
    by_row: tuple[Tensor, Tensor, Tensor]  # first tokens, starts, bases; as `_in_groups` orders
    masks: Masks = field(default_factory=dict)
    _groups: list[Group] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        rows: Sequence[Row],
        page_size: int,
        device: torch.device,
        wanted: Sequence[int] = (),
    ) -> StepPlan:
        """Raises ValueError when a row outgrows its pages."""
        spans = [_span(row, page_size, device) for row in rows]
        counts = [row.count for row in rows]
        at, order = list(accumulate(counts, initial=0)), _in_groups(counts)
        positions, slots, ids, wanted_, *by_row = to_device(
            (
                list(chain.from_iterable(range(span.start, span.stop) for span in spans)),
                list(chain.from_iterable(map(_slots_of, rows, spans, [page_size] * len(rows)))),
                list(chain.from_iterable(row.ids or () for row in rows)),
                wanted,
                [at[row] for row in order],
                [spans[row].start for row in order],
                [spans[row].base for row in order],
            ),
            device,
        )
        pages = [row.pages[: -(-row.stop // page_size)] for row in rows]
        highest = max(span.stop for span in spans) - 1
        first, start, base = by_row
        own = first, start, base
        return cls(page_size, pages, spans, counts, positions, slots, ids, wanted_, highest, own)

    @classmethod
    def of_shape(
        cls, x: Tensor, positions: Tensor, slots: Tensor, table: Tensor, page_size: int
    ) -> StepPlan:
        """Of one token in each row, where only shapes are known yet: contexts may be as long as
        `table` (B, P) has room for.
        """
        rows, pages = table.shape
        starts, bases = positions[:, None], torch.zeros_like(positions)[:, None]
        every = torch.arange(rows, device=positions.device)
        longest = pages * page_size
        group = Group(page_size, 1, longest, every, starts, starts, bases, table)
        own, counts = (every, positions, bases[:, 0]), [1] * rows
        return cls(
            page_size, [], [], counts, positions, slots, x, every, longest - 1, own, {}, [group]
        )

    def groups(self) -> list[Group]:
        """Rows of one token all together, longer ones one by one; in the order of tokens."""
        if not self._groups:
            order, single = _in_groups(self.counts), self.counts.count(1)
            first = list(accumulate(self.counts, initial=0))
            ends = [single] if single else []
            bounds = [0, *ends, *range(single + 1, len(order) + 1)]
            chosen = [slice(*pair) for pair in pairwise(bounds)]
            chosen.sort(key=lambda part: first[order[part.start]])
            self._groups.extend(self._group(order[part], part) for part in chosen)
        return self._groups

    def _group(self, rows: Sequence[int], part: slice) -> Group:
        spans = [self.spans[row] for row in rows]
        firsts, starts, bases = (each[part] for each in self.by_row)
        count = spans[0].count
        tokens = firsts
        if count > 1:  # of one row
            tokens = firsts + torch.arange(count, device=firsts.device)
        return Group(
            self.page_size,
            count,
            max(span.stop for span in spans),
            tokens,
            self.positions[tokens].view(len(rows), count),
            starts[:, None],
            bases[:, None],
            _table(spans, self.page_size, firsts.device),
            spans,
        )

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


def to_device(parts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, ...]:
    """Whole numbers, in one copy, for which nobody waits."""
    joined = torch.tensor(list(chain.from_iterable(parts)), dtype=torch.int64)
    if device.type == "cuda":
        joined = joined.pin_memory()
    return torch.split(joined.to(device, non_blocking=True), [len(part) for part in parts])


def _in_groups(counts: Sequence[int]) -> list[int]:
    """The rows, those of one token first."""
    return sorted(range(len(counts)), key=lambda row: counts[row] > 1)


def _slots_of(row: Row, span: Span, page_size: int) -> Sequence[int]:
    if span.pages is None:
        return range(span.base + span.start, span.base + span.stop)
    pages = row.pages
    places = range(span.start, span.stop)
    return [pages[at // page_size] * page_size + at % page_size for at in places]


def _table(spans: Sequence[Span], page_size: int, device: torch.device) -> Tensor | None:
    """(B, P); None where all rows have neighbours."""
    if all(span.pages is None for span in spans):
        return None
    pages = max(-(-span.stop // page_size) for span in spans)
    table = torch.zeros(len(spans), pages, dtype=torch.int64, device=device)
    for line, span in zip(table, spans, strict=True):
        if span.pages is not None:
            line[: len(span.pages)] = span.pages
        else:
            own = span.base // page_size
            torch.arange(own, own + pages, out=line)
    return table


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
