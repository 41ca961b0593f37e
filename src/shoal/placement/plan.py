"""Who should hold what when the slices of today make no route but could.

A layout grows layer by layer: from the boundary reached so far, the next node in the order takes
some layers, or none. For a given order of the nodes that search is exact. Few nodes: every order
counts. Many: the order in which they stand today, and some with the ends given to nodes that have
room for embedding and head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from heapq import nsmallest

from ..units import NodeId, Slice
from .choose import choose_slice
from .model import Member, ModelShape

MAX_EXACT = 4  # nodes; 2^n * n/2 searches
MAX_ENDS = 3  # pairs of end nodes that are tried for a larger pool

Cost = tuple[int, int, int, int]  # bytes to load, nodes that change, stages, imbalance
Stages = tuple[tuple[NodeId, Slice], ...]
Layouts = dict[int, tuple[Cost, Stages]]  # by boundary: the cheapest way to cover all before it

NOTHING: Layouts = {0: ((0, 0, 0, 0), ())}


def plan(shape: ModelShape, members: Sequence[Member]) -> dict[NodeId, Slice] | None:
    """Slices of a mesh that covers the model, few bytes away from today's; None if there is none.

    Nodes that the route does not need keep what they have. Without pinned nodes a plan is found
    whenever `coverable`; beside pinned ones, surely for up to MAX_EXACT others.
    """
    members = sorted(members, key=lambda member: member.node)
    pins = sorted(member.layers for member in members if member.pinned and member.layers)
    movable = [member for member in members if not member.pinned]
    start = _through(pins, dict(NOTHING))
    search = _every_order if len(movable) <= MAX_EXACT else _likely_orders
    layouts = search(shape, movable, pins, start)
    if shape.layers not in layouts:
        return None
    today = {member.node: member.layers for member in members if member.layers}
    return today | dict(layouts[shape.layers][1])


def _every_order(
    shape: ModelShape, movable: list[Member], pins: list[Slice], start: Layouts
) -> Layouts:
    """The cheapest layouts over all subsets of the nodes, each subset in its best order."""
    best = [start]
    for subset in range(1, 1 << len(movable)):
        layouts: Layouts = {}
        for i, member in enumerate(movable):
            if subset >> i & 1:
                _merge(layouts, _with(shape, member, pins, best[subset ^ 1 << i]))
        best.append(layouts)
    return best[-1]


def _likely_orders(
    shape: ModelShape, movable: list[Member], pins: list[Slice], start: Layouts
) -> Layouts:
    layouts: Layouts = {}
    for order in _orders(shape, movable):
        _merge(layouts, reduce(lambda so_far, m: _with(shape, m, pins, so_far), order, start))
    return layouts


def _with(shape: ModelShape, member: Member, pins: list[Slice], before: Layouts) -> Layouts:
    """All that `before` covers, and what it covers with this node next."""
    after = dict(before)
    for start, (cost, stages) in before.items():
        for new in _options(shape, member, start):
            total = _sum(cost, _cost(shape, member, new))
            if new.stop not in after or total < after[new.stop][0]:
                after[new.stop] = total, (*stages, (member.node, new))
    return _through(pins, after)


def _options(shape: ModelShape, member: Member, start: int) -> Iterator[Slice]:
    for stop in member.capacities.stops(start, shape.layers):
        yield Slice(start, stop)
    if start < shape.layers and member.capacities.reaches_end(start, shape.layers):
        yield Slice(start, shape.layers)


def _cost(shape: ModelShape, member: Member, new: Slice) -> Cost:
    changed = member.layers is not None and member.layers != new
    return shape.moved_bytes(new, member.layers), changed, 1, len(new) ** 2


def _sum(one: Cost, other: Cost) -> Cost:
    return one[0] + other[0], one[1] + other[1], one[2] + other[2], one[3] + other[3]


def _through(pins: list[Slice], layouts: Layouts) -> Layouts:
    """Pinned slices cost nothing: whoever reaches their start has reached their stop."""
    for pin in pins:
        if pin.start in layouts:
            _merge(layouts, {pin.stop: layouts[pin.start]})
    return layouts


def _merge(into: Layouts, other: Layouts) -> None:
    for boundary, layout in other.items():
        if boundary not in into or layout[0] < into[boundary][0]:
            into[boundary] = layout


def _orders(shape: ModelShape, movable: list[Member]) -> Iterator[list[Member]]:
    """Orders worth a try: the nodes as they stand, then with other nodes at the ends."""
    places = _places(shape, movable)
    standing = sorted(movable, key=lambda member: (places[member.node], member.node))
    yield standing
    for first, last in nsmallest(
        MAX_ENDS, _ends(shape, standing), key=lambda pair: _distance(shape, places, *pair)
    ):
        yield [first, *(m for m in standing if m not in (first, last)), last]


def _places(shape: ModelShape, movable: list[Member]) -> dict[NodeId, Slice]:
    """Where each node stands; a free one where it would help most."""
    places = {member.node: member.layers for member in movable if member.layers}
    for member in movable:
        if member.node not in places:
            chosen = choose_slice(shape.layers, member.capacities, list(places.values()))
            places[member.node] = chosen or Slice(0, 1)
    return places


def _distance(
    shape: ModelShape, places: dict[NodeId, Slice], first: Member, last: Member
) -> tuple[int, NodeId, NodeId]:
    """How far two nodes stand from the ends."""
    far = places[first.node].start + shape.layers - places[last.node].stop
    return far, first.node, last.node


def _ends(shape: ModelShape, movable: list[Member]) -> Iterator[tuple[Member, Member]]:
    """Pairs that leave enough room between them when the ends are theirs (see `coverable`)."""
    between = sum(min(member.capacities.middle, shape.layers) for member in movable)
    for first in movable:
        for last in movable:
            ends = first.capacities.embedding + last.capacities.head
            room = between + ends - first.capacities.middle - last.capacities.middle
            possible = first.capacities.embedding and last.capacities.head
            if first != last and possible and room >= shape.layers:
                yield first, last
