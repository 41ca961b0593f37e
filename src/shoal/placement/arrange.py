"""Where nodes do most good together: every layer held first, then the weakest as strong as can be.

A layer is as strong as what its holders give it, each its tokens/s spread over the layers it runs.
Nodes are laid one after the other, the strongest first, each where the sum of 1 / strength^2 falls
the most; then each may think again, knowing the others, until nobody wants to. For a few nodes that
is repeated with less room for each, which finds even cuts that no single node could step to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..units import NodeId, Slice
from .capacity import Capacities

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Numbers = NDArray[Any]

PASSES = 6  # in which everybody may think again
STAY = 1.01  # so much better must another place be
MEETS = 0.005  # what an edge is worth that others share: chains stay short
FAINT = 0.25  # of the mean: below it, strength is strength
EVEN = (1, 2, 3)  # how often all layers are held, in the further tries
FEW = 32  # nodes, for which there are further tries


@dataclass(frozen=True, slots=True)
class Item:
    """A node to be laid. `rates[n - 1]` is its tokens/s when it runs n layers."""

    node: NodeId
    capacities: Capacities
    rates: tuple[float, ...]

    @property
    def most(self) -> int:
        """Layers."""
        room = self.capacities
        return min(max(room.middle, room.embedding, room.head, room.both), len(self.rates))

    @property
    def density(self) -> float:
        return self.rates[self.most - 1] / self.most


@dataclass(frozen=True, slots=True)
class Laid:
    """A slice in its place, and the tokens/s that its node gives when all of it is run."""

    layers: Slice
    tokens_per_s: float

    @property
    def work(self) -> float:
        """Layers times tokens/s, wherever in the slice they are done."""
        return len(self.layers) * self.tokens_per_s


Layout = dict[NodeId, Laid]


def arrange(
    layers: int,
    items: Sequence[Item],
    fixed: Sequence[Laid] = (),
    ground: Slice | None = None,
    *,
    quick: bool = False,
) -> Layout:
    """Slices for all items that fit anywhere on `ground`, given the fixed ones. `quick` makes no
    further tries.
    """
    ground = ground or Slice(0, layers)
    return dict(_arranged(layers, tuple(items), tuple(fixed), ground, quick))


@lru_cache(maxsize=64)  # of the same nodes the best layout is asked for at every change of the view
def _arranged(
    layers: int, items: tuple[Item, ...], fixed: tuple[Laid, ...], ground: Slice, quick: bool
) -> Layout:
    best = _settled(layers, items, fixed, ground)
    if 0 < len(items) <= FEW and not quick:
        tries = [best]
        for times in EVEN:
            limited = _limited(items, times * len(ground))
            if limited != list(items):
                tries.append(_settled(layers, limited, fixed, ground))
        best = max(tries, key=lambda laid: throughput(layers, [*fixed, *laid.values()], ground))
    return best


def _settled(layers: int, items: Sequence[Item], fixed: Sequence[Laid], ground: Slice) -> Layout:
    field = Field(layers, fixed, ground, sum(item.rates[0] for item in items if item.most))
    order = sorted(
        (item for item in items if item.most), key=lambda item: (-item.density, item.node)
    )
    layout: Layout = {}
    for item in order:
        if (laid := field.best(item)) is not None:
            layout[item.node] = laid
            field.add(laid)
    for _ in range(PASSES):
        changed = False
        for item in order:
            if (before := layout.get(item.node)) is not None:
                field.take(before)
                laid = field.best(item, before) or before
                changed |= laid != before
                layout[item.node] = laid
                field.add(laid)
        if not changed:
            break
    return layout


def _limited(items: Sequence[Item], total: int) -> list[Item]:
    """With room for `total` layers in all, in proportion to speed (water-filling)."""
    if sum(item.most for item in items) <= total:
        return list(items)
    low, high = 0.0, float(total)
    works = [item.rates[item.most - 1] * item.most if item.most else 0.0 for item in items]
    fastest = max(works)
    pairs = [(item.most, work / fastest) for item, work in zip(items, works, strict=True)]
    for _ in range(40):
        middle = (low + high) / 2
        room = sum(min(most, middle * share) for most, share in pairs)
        low, high = (middle, high) if room < total else (low, middle)
    shares = [max(1, -int(-(high * share - 1e-6) // 1)) for _, share in pairs]
    return [_capped(item, share) for item, share in zip(items, shares, strict=True)]


def _capped(item: Item, most: int) -> Item:
    room = item.capacities
    sizes = (room.middle, room.embedding, room.head, room.both)
    return replace(item, capacities=Capacities(*(min(size, most) for size in sizes)))


def forget() -> None:
    """As if nothing had been arranged yet: for whoever measures how long it takes."""
    _arranged.cache_clear()


class Field:
    """The strength of each layer on `ground`, to which slices are added one by one."""

    def __init__(
        self, layers: int, fixed: Sequence[Laid], ground: Slice, expected: float = 0.0
    ) -> None:
        import numpy

        self._np = numpy
        self._known: dict[object, tuple[Numbers, Numbers, Numbers]] = {}
        self.layers, self.ground = layers, ground
        self._strength = numpy.zeros(layers)
        self._holders = numpy.zeros(layers, dtype=int)
        self._edges = numpy.zeros(layers + 1, dtype=int)
        self._edges[[ground.start, ground.stop]] = 1
        for laid in fixed:
            self.add(laid)
        total = expected + float(sum(laid.work for laid in fixed))
        self._faint = FAINT * total / len(ground) or 1.0

    def add(self, laid: Laid, sign: int = 1) -> None:
        part = laid.layers
        self._strength[part.start : part.stop] += sign * laid.tokens_per_s
        self._holders[part.start : part.stop] += sign
        self._edges[[part.start, part.stop]] += sign

    def take(self, laid: Laid) -> None:
        self.add(laid, -1)

    def best(self, item: Item, today: Laid | None = None, must: Slice | None = None) -> Laid | None:
        """Where on the ground this node does most good; `must` is to be part of it."""
        np, ground = self._np, self.ground
        rates, ends, possible = self._windows(item, must)
        if not possible.any():
            return None
        strength = np.maximum(self._strength[ground.start : ground.stop], self._faint)
        gains = _summed(np, strength**-2 - (strength + rates[:, None]) ** -2)
        gain = np.take_along_axis(gains, ends, axis=1) - gains[:, :-1]
        shared = MEETS * (self._edges[ground.start : ground.stop + 1] > 0)
        gain *= 1 + shared[:-1] + shared[ends]
        filled = np.zeros(len(ground) + 1, dtype=int)
        np.cumsum(self._holders[ground.start : ground.stop] <= 0, out=filled[1:])
        if filled[-1]:
            new = np.where(possible, filled[ends] - filled[:-1], -1)
            possible = possible & (new == new.max())
        gain = np.where(possible, gain, -1.0)
        if today is not None:
            place = len(today.layers) - 1, today.layers.start - ground.start
            if place[0] < len(rates) and 0 <= place[1] < len(ground):
                gain[place] *= STAY
        length, start = divmod(int(gain.argmax()), len(ground))
        start += ground.start
        return Laid(Slice(start, start + length + 1), item.rates[length])

    def _windows(self, item: Item, must: Slice | None) -> tuple[Numbers, Numbers, Numbers]:
        """By length and start: the rate, where it ends on the ground, and whether it fits there."""
        key = item.capacities, item.rates, must
        if key not in self._known:
            np, ground = self._np, self.ground
            rates = np.array(item.rates[: min(item.most, len(ground))])
            starts = np.arange(ground.start, ground.stop)
            stops = starts[None, :] + np.arange(1, len(rates) + 1)[:, None]
            possible = self._possible(item.capacities, starts, stops)
            if must is not None:
                possible &= (starts <= must.start) & (stops >= must.stop)
            self._known[key] = rates, np.minimum(stops, ground.stop) - ground.start, possible
        return self._known[key]

    def _possible(self, room: Capacities, starts: Numbers, stops: Numbers) -> Numbers:
        """Which windows lie on the ground and fit."""
        np, last = self._np, self.layers
        head, embedding = stops == last, np.broadcast_to(starts == 0, stops.shape)
        most = np.where(
            head,
            np.where(embedding, room.both if room.both >= last else 0, room.head),
            np.where(embedding, room.embedding, room.middle),
        )
        fitting: Numbers = (stops - starts <= most) & (stops <= self.ground.stop)
        return fitting


def _summed(np: Any, rows: Numbers) -> Numbers:
    sums: Numbers = np.zeros((rows.shape[0], rows.shape[1] + 1))
    np.cumsum(rows, axis=1, out=sums[:, 1:])
    return sums


def throughput(layers: int, laid: Sequence[Laid], ground: Slice | None = None) -> float:
    """Tokens/s that these slices can carry together when each runs what part of it is best.

    Exact but for the network: by Hall's theorem a rate is possible when no set of layers asks more
    work than those who hold any of it can do. What cannot help them lies in the runs between, so
    the worst set is found run by run (and the rate by Dinkelbach's iteration).
    """
    import numpy as np

    ground = ground or Slice(0, layers)
    size = len(ground)
    within = np.zeros((size + 1, size + 1))
    covered = np.zeros(size, dtype=bool)
    for one in laid:
        start = max(one.layers.start, ground.start) - ground.start
        stop = min(one.layers.stop, ground.stop) - ground.start
        if start < stop:
            within[start, stop] += one.work
            covered[start:stop] = True
    if not covered.all():
        return 0.0
    total = float(within.sum())
    within = np.cumsum(np.cumsum(within[::-1], axis=0)[::-1], axis=1)  # all work inside a run
    lengths = np.arange(size + 1)[None, :] - np.arange(size + 1)[:, None]
    rate = total / size
    for _ in range(size):
        idle, free = _idle(np, within, within - rate * lengths)
        if free >= size or total - idle >= rate * (size - free) * (1 - 1e-9):
            break
        rate = (total - idle) / (size - free)
    return rate


def _idle(np: Any, within: Numbers, spare: Numbers) -> tuple[float, int]:
    """The work, and the number of layers, of the runs which have the most work to spare."""
    size = len(spare) - 1
    best, came = np.zeros(size + 1), [-1] * (size + 1)
    for stop in range(1, size + 1):
        options = best[:stop] + spare[:stop, stop]
        start = int(options.argmax())
        best[stop] = best[stop - 1]
        if options[start] > best[stop]:
            best[stop], came[stop] = options[start], start
    work, free, stop = 0.0, 0, size
    while stop > 0:
        start = came[stop]
        if start >= 0:
            work, free = work + float(within[start, stop]), free + stop - start
        stop = start if start >= 0 else stop - 1
    return work, free
