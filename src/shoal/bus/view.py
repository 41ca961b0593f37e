"""Who is in the mesh, as far as we have heard: state, not a service. No clock of its own."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from ..units import ModelId, NodeId
from .announcement import Announcement, Demand, StageOffer
from .cells import MAX_DEPTH, cell_of, common_depth

MAX_NODES = 4096
RETRY_S = 5.0
MUCH = 2.0  # so many times as much is asked for, or as little
LITTLE = 0.001  # tokens/s in the whole mesh that are none
MOST = 1000.0  # tokens/s of one gateway: it may lie

Seen = tuple[Announcement, float]  # with the time of receipt by our own clock


class MeshView:
    """A node is alive by when WE heard it, never by its clock. Whatever is not said to cost more
    takes the same time however many nodes there are.

    version   grows with every change that a decision could depend on: the key of a cache
    layout    grows when nodes come or go, hold something else, may hold or are asked for something
              else, or for much more or less; not when only their load moves
    """

    def __init__(self, me: NodeId | None = None) -> None:
        self.version = 0
        self.layout = 0
        self._cell = cell_of(me) if me else 0
        self._nodes: dict[NodeId, Seen] = {}  # in the order in which they were heard last
        self._sorted: list[NodeId] = []
        self._ends: list[tuple[float, NodeId]] = []  # a heap; nobody runs out before its entry
        self._list: tuple[Announcement, ...] | None = ()
        self._shared = [0] * (MAX_DEPTH + 1)  # nodes that share exactly so many cells with us
        self._asked = Asked()

    @property
    def nodes(self) -> Mapping[NodeId, Seen]:
        """In the order in which they were heard last."""
        return MappingProxyType(self._nodes)

    def apply(self, announcement: Announcement, now: float) -> bool:
        """Take this announcement; False when we hold a newer one, or the mesh is full."""
        node = announcement.node
        known = self._nodes.get(node)
        if known is None and len(self._nodes) >= MAX_NODES:
            return False
        if known is not None and known[0].sequence > announcement.sequence:
            return False
        if known is None:
            insort(self._sorted, node)
            self._count(node, 1)
            heapq.heappush(self._ends, (_end((announcement, now)), node))
        else:
            del self._nodes[node]  # to go to the end
        self._nodes[node] = announcement, now
        self._tidy()
        self._note(known[0] if known else None, announcement)
        return True

    def remove(self, node: NodeId) -> bool:
        """After a goodbye. False when it is unknown."""
        seen = self._nodes.pop(node, None)
        if seen is None:
            return False
        del self._sorted[bisect_left(self._sorted, node)]
        self._count(node, -1)
        self._note(seen[0], None)
        return True

    def expire(self, now: float, lives: Callable[[NodeId], bool] | None = None) -> list[NodeId]:
        """Remove those whose announcement ran out; sorted. Takes time for those alone. Who `lives`
        all the same is looked at again after RETRY_S.
        """
        gone = []
        while self._ends and self._ends[0][0] < now:
            _, node = heapq.heappop(self._ends)
            seen = self._nodes.get(node)
            if seen is None:
                continue
            end = _end(seen)
            if end < now and lives is not None and lives(node):
                end = now + RETRY_S
            if end < now:
                gone.append(node)
                self.remove(node)
            else:
                heapq.heappush(self._ends, (end, node))
        return sorted(gone)

    def announcements(self) -> tuple[Announcement, ...]:
        """All of them, sorted by node id, so that every node reads the same list. The same tuple
        until something changes; making a new one takes time for each node.
        """
        if self._list is None:
            self._list = tuple(self._nodes[node][0] for node in self._sorted)
        return self._list

    def get(self, node: NodeId) -> Announcement | None:
        seen = self._nodes.get(node)
        return seen[0] if seen else None

    def heard_at(self, depth: int) -> int:
        """How many of them are in our cell of that depth."""
        return sum(self._shared[depth:])

    def __len__(self) -> int:
        return len(self._nodes)

    def _tidy(self) -> None:
        """Who comes and goes leaves an entry each time."""
        if len(self._ends) > 2 * len(self._nodes) + 64:
            self._ends = [(_end(seen), node) for node, seen in self._nodes.items()]
            heapq.heapify(self._ends)

    def _count(self, node: NodeId, count: int) -> None:
        self._shared[common_depth(self._cell, cell_of(node))] += count

    def _note(self, old: Announcement | None, new: Announcement | None) -> None:
        self._list = None
        if old is None or new is None or _substance(old) != _substance(new):
            self.version += 1
            asked = self._asked.moved(old.demand if old else (), new.demand if new else ())
            self.layout += asked or old is None or new is None or not same_layout(old, new)


class Asked:
    """What is asked of each model in the mesh never stands still: it counts as another once it is
    twice or half as much.
    """

    def __init__(self) -> None:
        self._now: dict[ModelId, float] = {}  # tokens/s
        self._counted: dict[ModelId, float] = {}

    def moved(self, old: Sequence[Demand], new: Sequence[Demand]) -> bool:
        """One gateway's share is another now."""
        if old == new:
            return False
        for sign, said in ((-1, old), (1, new)):
            for each in said:
                share = sign * min(each.tokens_per_s, MOST)
                self._now[each.model] = self._now.get(each.model, 0.0) + share
        models = dict.fromkeys(each.model for each in (*old, *new))
        return any([self._counts_anew(model) for model in models])

    def _counts_anew(self, model: ModelId) -> bool:
        now, counted = self._now[model], self._counted.get(model, 0.0)
        if now < LITTLE:
            self._counted.pop(model, None)
            del self._now[model]
            return counted > 0
        if max(now, counted) <= MUCH * min(now, counted):
            return False
        self._counted[model] = now
        return True


def same_layout(a: Announcement, b: Announcement) -> bool:
    """They hold the same, and may hold and are to be asked the same."""
    return _layout(a) == _layout(b)


def _end(seen: Seen) -> float:
    return seen[1] + seen[0].lifetime_s


def _substance(said: Announcement) -> tuple[object, ...]:
    """All that matters to anybody."""
    return (
        *(said.stages, said.place, said.addresses, said.capability, said.card, said.gateway),
        *(said.demand, said.can_serve, said.offered_bytes, said.name, said.software),
    )


def _layout(said: Announcement) -> tuple[object, ...]:
    stages = tuple(map(_held, said.stages))
    return stages, said.can_serve, said.offered_bytes, said.gateway


def _held(offer: StageOffer) -> tuple[object, ...]:
    return offer.model, offer.total_layers, offer.layers, offer.compute, offer.state, offer.pinned
