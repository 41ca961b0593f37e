"""Who should hold what when today's slices leave a hole that those who are free cannot fill.

A layout grows layer by layer: from the boundary reached so far, the next node in the order takes
some layers, or none. For a given order of the nodes that search is exact. Few nodes: every order
counts. Many: the order in which they stand today, and some with the ends given to nodes that have
room for embedding and head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import nsmallest
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from ..units import NodeId, Slice
from .model import Member, ModelShape

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Numbers = NDArray[Any]

MAX_EXACT = 6  # nodes; 2^n * n/2 searches
MAX_ENDS = 3  # pairs of end nodes that are tried for a larger pool
MAX_NEAR = 6  # nodes at either end that are thought of for it
MAX_MOVERS = 128  # of thousands of nodes, so many may move
NEVER = 1 << 61
SHIFT = 22  # bits below the bytes: how many nodes change, and how uneven their shares are


@dataclass(frozen=True)
class Search:
    """What all layouts of one model share. `fixed` slices stay, whatever happens."""

    shape: ModelShape
    fixed: tuple[Slice, ...]
    whole: bool

    @property
    def layers(self) -> int:
        return self.shape.layers

    @cached_property
    def _np(self) -> Any:
        import numpy

        return numpy

    @cached_property
    def _grid(self) -> tuple[Numbers, Numbers, Numbers]:
        """Starts, stops and the bytes between, for all pairs of boundaries."""
        np = self._np
        sums = np.array(self.shape.sums, dtype=np.int64)
        at = np.arange(self.layers + 1)
        return at[:, None], at[None, :], sums

    @cached_property
    def jumps(self) -> list[tuple[int, int]]:
        """From which boundary the fixed slices lead to which."""
        if self.whole:
            return [(part.start, part.stop) for part in sorted(self.fixed)]
        far = list(range(self.layers + 1))
        for part in self.fixed:
            far[part.start] = max(far[part.start], min(part.stop, self.layers))
        reach = list(accumulate(far, max))
        return [(b, stop) for b, stop in enumerate(reach) if stop > b]

    def prices(self, member: Member) -> Numbers:
        """What it costs that this node takes the layers between two boundaries.

        Bytes that a node must load which has others; free nodes load anyway. Then the number of
        those which change, then long shares.
        """
        np, shape, old = self._np, self.shape, member.layers
        starts, stops, sums = self._grid
        lengths = stops - starts
        room, last = member.capacities, self.layers
        most = np.where(
            stops == last,
            np.where(starts == 0, room.both if room.both >= last else 0, room.head),
            np.where(starts == 0, room.embedding, room.middle),
        )
        unit = max(1, sums[-1] + shape.embed_bytes + shape.head_bytes >> 36)
        uneven = lengths * lengths * 1024 // (last * last)
        price = np.full(lengths.shape, 0, dtype=np.int64)
        if old is not None:
            first, final = np.minimum(stops, old.stop), np.maximum(starts, old.start)
            kept = np.where(first > final, sums[first] - sums[np.minimum(final, last)], 0)
            moved = sums[stops] - sums[starts] - kept + self._ends(old)
            price = (np.maximum(moved, 0) // unit << SHIFT) + 1024
        price = price + uneven
        price = np.where((lengths > 0) & (lengths <= most), price, NEVER)
        if old is not None:
            stays = (starts == old.start) & (stops == old.stop)
            if not self.whole:
                stays = (starts >= old.start) & (stops <= old.stop) & (lengths > 0)
            price = np.where(stays, uneven, price)
        found: Numbers = price
        return found

    def _ends(self, old: Slice) -> Numbers:
        """Bytes of embedding and head that come with layers at the ends."""
        np, shape, last = self._np, self.shape, self.layers
        had = (old.start == 0, old.stop == last)
        ends: Numbers = np.zeros((last + 1, last + 1), dtype=np.int64)
        ends[0, :] = shape.added_ends((True, False), had)
        ends[:, last] = shape.added_ends((False, True), had)
        ends[0, last] = shape.added_ends((True, True), had)
        return ends

    def start(self) -> Layouts:
        costs = self._np.full(self.layers + 1, NEVER, dtype=self._np.int64)
        costs[0] = 0
        return self.through(Layouts(costs, {0: ()}))

    def with_next(self, before: Layouts, member: Member, prices: Numbers) -> Layouts:
        """All that `before` covers, and what it covers with this node next."""
        np = self._np
        options = before.costs[:, None] + prices
        came = options.argmin(axis=0)
        found = options[came, np.arange(self.layers + 1)]
        better = found < before.costs
        trails = dict(before.trails)
        for stop in np.flatnonzero(better).tolist():
            start = int(came[stop])
            trails[stop] = (before.trails[start], (member, start, stop))
        return self.through(Layouts(np.where(better, found, before.costs), trails))

    def through(self, layouts: Layouts) -> Layouts:
        """Fixed slices cost nothing: whoever reaches one has reached its stop."""
        for start, stop in self.jumps:
            if layouts.costs[start] < min(NEVER, layouts.costs[stop]):
                layouts.costs[stop] = layouts.costs[start]
                layouts.trails[stop] = layouts.trails[start]
        return layouts

    def merged(self, one: Layouts, other: Layouts) -> Layouts:
        better = other.costs < one.costs
        trails = dict(one.trails)
        trails.update({b: other.trails[b] for b in self._np.flatnonzero(better).tolist()})
        return Layouts(self._np.where(better, other.costs, one.costs), trails)


@dataclass(frozen=True, slots=True)
class Layouts:
    """By boundary: the least cost of covering all before it, and how (newest part outside)."""

    costs: Numbers
    trails: dict[int, Any]


def plan(
    shape: ModelShape,
    members: Sequence[Member],
    *,
    whole: bool = False,
    hints: Mapping[NodeId, Slice] | None = None,
) -> dict[NodeId, Slice] | None:
    """Slices of a mesh that covers the model, few bytes away from today's; None if there is none.

    Nodes that are not needed keep what they have, the others as much of it as fits. `hints` says
    where free nodes would stand. Without pinned nodes a plan is found whenever `coverable`; beside
    pinned ones, surely for up to MAX_EXACT others.
    """
    members = sorted(members, key=lambda member: member.node)
    today = {member.node: member.layers for member in members if member.layers}
    able = [one for one in members if not one.pinned and _most(one)]
    movable = _movers(shape, able)
    moving = {member.node for member in movable}
    fixed = tuple(part for node, part in today.items() if node not in moving)
    search = Search(shape, fixed, whole)
    if len(movable) <= MAX_EXACT:
        layouts = _every_order(search, movable)
    else:
        layouts = _likely_orders(search, movable, today | dict(hints or {}))
    if layouts.costs[shape.layers] >= NEVER:
        return None
    trail = layouts.trails[shape.layers]
    while trail:
        trail, (member, start, stop) = trail
        today[member.node] = _widened(shape, member, Slice(start, stop), whole)
    return today


def _most(member: Member) -> int:
    room = member.capacities
    return max(room.middle, room.embedding, room.head, room.both)


def _movers(shape: ModelShape, able: list[Member]) -> list[Member]:
    """Of thousands those with the most room: with a layer each they would do."""
    most = max(MAX_MOVERS, shape.layers + 2)
    if len(able) <= most:
        return able
    ends = {one.node for pair in _end_pairs(able, shape.layers, {}) for one in pair}
    large = sorted(able, key=lambda one: (one.node not in ends, -one.capacities.middle, one.node))
    return sorted(large[:most], key=lambda one: one.node)


def _widened(shape: ModelShape, member: Member, part: Slice, whole: bool) -> Slice:
    """With as much of what the node holds already as fits beside what it has to take."""
    old = member.layers
    if whole or old is None or part.start > old.stop or part.stop < old.start:
        return part
    if old.start <= part.start and part.stop <= old.stop:
        return old
    start, stop = min(part.start, old.start), max(part.stop, old.stop)
    while not member.capacities.fits(Slice(start, stop), shape.layers):
        if stop > part.stop:
            stop -= 1
        elif start < part.start:
            start += 1
        else:
            break
    return Slice(start, stop)


def _every_order(search: Search, movable: list[Member]) -> Layouts:
    """The cheapest layouts over all subsets of the nodes, each subset in its best order."""
    best = [search.start()]
    prices = [search.prices(member) for member in movable]
    for subset in range(1, 1 << len(movable)):
        layouts: Layouts | None = None
        for i, member in enumerate(movable):
            if subset >> i & 1:
                found = search.with_next(best[subset ^ 1 << i], member, prices[i])
                layouts = found if layouts is None else search.merged(layouts, found)
        if layouts is not None:
            best.append(layouts)
    return best[-1]


def _likely_orders(
    search: Search, movable: list[Member], places: Mapping[NodeId, Slice]
) -> Layouts:
    prices = {member.node: search.prices(member) for member in movable}
    layouts = search.start()
    for order in _orders(search.layers, movable, places):
        found = search.start()
        for member in order:
            found = search.with_next(found, member, prices[member.node])
        layouts = search.merged(layouts, found)
    return layouts


def _orders(
    layers: int, movable: list[Member], places: Mapping[NodeId, Slice]
) -> Iterator[list[Member]]:
    """Orders worth a try: the nodes as they stand, then with other nodes at the ends, then the
    large ones first and last.
    """
    somewhere = Slice(0, 1)
    standing = sorted(movable, key=lambda one: (places.get(one.node, somewhere), one.node))
    yield standing
    pairs = _end_pairs(standing, layers, places)
    far = {one.node: places.get(one.node, somewhere) for one in movable}
    nearest = nsmallest(
        MAX_ENDS,
        pairs,
        key=lambda pair: (
            far[pair[0].node].start + layers - far[pair[1].node].stop,
            pair[0].node,
            pair[1].node,
        ),
    )
    for first, last in nearest:
        yield [first, *(one for one in standing if one not in (first, last)), last]
    by_size = sorted(movable, key=lambda one: (one.capacities.middle, one.node))
    yield by_size
    yield by_size[::-1]


def _end_pairs(
    standing: Sequence[Member], layers: int, places: Mapping[NodeId, Slice]
) -> list[tuple[Member, Member]]:
    """Pairs that leave enough room between them when the ends are theirs (see `coverable`), of
    those that stand near the ends, and those that lose the least there.
    """
    room = sum(min(one.capacities.middle, layers) for one in standing)

    def loss(one: Member, end: int) -> int:
        return min(one.capacities.middle, layers) - end

    firsts = [one for one in standing if one.capacities.embedding]
    lasts = [one for one in standing if one.capacities.head]
    cheap = [
        *nsmallest(2, firsts, key=lambda one: (loss(one, one.capacities.embedding), one.node)),
        *firsts[:MAX_NEAR],
    ]
    cheap_lasts = [
        *nsmallest(2, lasts, key=lambda one: (loss(one, one.capacities.head), one.node)),
        *lasts[-MAX_NEAR:],
    ]
    return [
        (first, last)
        for first in dict.fromkeys(cheap)
        for last in dict.fromkeys(cheap_lasts)
        if first.node != last.node
        and room - loss(first, first.capacities.embedding) - loss(last, last.capacities.head)
        >= layers
    ]
