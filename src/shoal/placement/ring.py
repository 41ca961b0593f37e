"""The cheapest way through the layers of a model, by dynamic programming over all stages at once.

At each boundary between layers a way goes on in its stage or hops to another. Boundaries are the
places where some stage starts or stops: a stage takes the same time for each layer, so nothing is
gained by a change in between. Ways from all first stages are carried along together, because the
hop back to the first one counts as well.

A node runs one part of a session. A cheapest way that comes to a node twice is therefore split into
cases that each exclude it, and the cheapest case counts (branch and bound).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count, pairwise
from typing import TYPE_CHECKING, NamedTuple

from ..units import NodeId, Slice

if TYPE_CHECKING:
    from numpy import bool_, float64, intp
    from numpy.typing import NDArray

    Floats = NDArray[float64]
    Places = NDArray[intp]
    Flags = NDArray[bool_]

MAX_CASES = 48  # are looked at for the cheapest; then the first that is a route counts
MAX_CELLS = 1 << 22  # of one look, hops from all first stages: of more of those the best count
MAX_EFFORT = 1 << 23  # cells of all looks together; then the way with the fewest stages is taken
WALK_CELLS = 1 << 13  # what each boundary costs beside its cells
END = 1 << 30  # beyond every model


class Piece(NamedTuple):
    """Layers that a stage may run: any part of them, or all or none when `whole`."""

    stage: int  # its place in the costs
    start: int
    stop: int
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds, for S stages on these nodes."""

    nodes: tuple[NodeId, ...]
    fixed: Floats  # [S] for coming to a stage
    layer: Floats  # [S] for each layer it runs
    hop: Floats  # [S, S] from one stage to the next
    back: Floats | None  # [S, S] from the last stage to the first; None: no ring is closed
    first: Floats  # [S] for being the first
    last: Floats  # [S] for being the last


Part = tuple[int, Slice]  # a stage and what it runs
Way = tuple[float, tuple[Part, ...]]  # seconds; the parts in the order of their layers


def cheapest_way(layers: int, pieces: Sequence[Piece], costs: Costs) -> Way | None:
    """The cheapest way from layer 0 to the end, each node at most once; None if there is none."""
    order = count()  # so that equally cheap cases are never compared further
    cases: list[tuple[float, int, Sequence[Piece], Way]] = []
    left = MAX_EFFORT

    def consider(case: Sequence[Piece], looked: int) -> None:
        nonlocal left
        left -= _effort(layers, case, costs)
        way = cheapest_walk(layers, case, costs)
        if way is not None:
            rank = way[0] if looked < MAX_CASES else -float(looked)
            heappush(cases, (rank, next(order), case, way))

    consider(pieces, 0)
    for looked in range(10 * MAX_CASES):
        if not cases:
            return None
        _, _, case, way = heappop(cases)
        twice = _twice(way[1], costs.nodes)
        if twice is None:
            return way
        if left <= 0:
            break
        for rest in _excluding(case, costs.nodes, *twice):
            consider(rest, looked)
    return cheapest_walk(layers, few_stages(layers, pieces, costs), costs)


def few_stages(layers: int, pieces: Iterable[Piece], costs: Costs) -> list[Piece]:
    """Pieces that lie end to end, as long as can be, each of another node."""
    out: list[Piece] = []
    todo, used, at = list(pieces), set[NodeId](), 0
    while at < layers:
        todo = [one for one in todo if one.stop > at and costs.nodes[one.stage] not in used]
        ready = [one for one in todo if one.start == at or (one.start < at and not one.whole)]
        if not ready:
            return []
        best = max(ready, key=lambda one: (one.stop, -costs.layer[one.stage]))
        out.append(best._replace(start=at, whole=True))
        used.add(costs.nodes[best.stage])
        at = best.stop
    return out


def _twice(parts: Sequence[Part], nodes: Sequence[NodeId]) -> tuple[NodeId, int, int] | None:
    """A node that the way comes to twice: where it leaves it, and where it comes back."""
    left: dict[NodeId, int] = {}
    for stage, run in parts:
        if nodes[stage] in left:
            return nodes[stage], left[nodes[stage]], run.start
        left[nodes[stage]] = run.stop
    return None


def _excluding(
    case: Sequence[Piece], nodes: Sequence[NodeId], node: NodeId, left: int, back: int
) -> Iterable[list[Piece]]:
    """Cases which together hold every way on which `node` runs one part: all between where it was
    left and where the way came back, or it stops before that, or starts after it.
    """
    yield without(case, left, back, lambda piece: nodes[piece.stage] != node)
    yield without(case, back, END, lambda piece: nodes[piece.stage] == node)
    yield without(case, 0, left, lambda piece: nodes[piece.stage] == node)


def without(
    pieces: Iterable[Piece], start: int, stop: int, which: Callable[[Piece], bool]
) -> list[Piece]:
    """With layers start..stop-1 cut out of the pieces for which `which` is true."""
    out: list[Piece] = []
    for piece in pieces:
        if not which(piece) or piece.stop <= start or stop <= piece.start:
            out.append(piece)
        elif not piece.whole:
            if piece.start < start:
                out.append(piece._replace(stop=start))
            if stop < piece.stop:
                out.append(piece._replace(start=stop))
    return out


# ---- the programme. H first stages, N pieces, K boundaries


def cheapest_walk(layers: int, pieces: Sequence[Piece], costs: Costs) -> Way | None:
    """The cheapest way, which may come to a node twice."""
    import numpy as np

    found = _tabled(layers, pieces)
    if found is None:
        return None
    bounds, table = found
    heads = _best_heads(table, bounds, costs)
    best, came = _filled(bounds, table, heads, costs)
    total = _closed(best, table, heads, costs, len(bounds) - 1)
    head, tail = np.unravel_index(int(np.argmin(total)), total.shape)
    if not np.isfinite(total[head, tail]):
        return None
    parts = _traced(came, bounds, table, int(head), int(tail))
    return float(total[head, tail]), parts


def _tabled(layers: int, pieces: Sequence[Piece]) -> tuple[list[int], _Table] | None:
    """The boundaries, and the pieces as columns; None where none begins the model."""
    import numpy as np

    usable = [piece for piece in pieces if piece.stop <= layers]
    if not any(piece.start == 0 for piece in usable):
        return None
    bounds = sorted({0, layers, layers - 1, *(p.start for p in usable), *(p.stop for p in usable)})
    places = {layer: place for place, layer in enumerate(bounds)}
    table = _Table(
        stage=np.array([piece.stage for piece in usable]),
        start=np.array([places[piece.start] for piece in usable]),
        stop=np.array([places[piece.stop] for piece in usable]),
        whole=np.array([piece.whole for piece in usable]),
    )
    return bounds, table


def _best_heads(table: _Table, bounds: Sequence[int], costs: Costs) -> Places:
    """Who may come first; of very many the cheapest by themselves."""
    import numpy as np

    heads: Places = np.flatnonzero(table.start == 0)
    most = max(1, MAX_CELLS // max(1, table.cells(len(bounds))))
    if costs.back is None or len(heads) <= most:
        return heads
    stages = table.stage[heads]
    runs = np.array(bounds)[table.stop[heads]]
    price = (costs.first + costs.fixed)[stages] / runs + costs.layer[stages]
    return np.sort(heads[np.argsort(price, kind="stable")[:most]])


def _effort(layers: int, pieces: Sequence[Piece], costs: Costs) -> int:
    """About how many cells a look takes."""
    found = _tabled(layers, pieces)
    if found is None:
        return 0
    bounds, table = found
    rows = len(_best_heads(table, bounds, costs)) if costs.back is not None else 1
    return rows * table.cells(len(bounds)) + WALK_CELLS * len(bounds)


@dataclass(frozen=True, slots=True)
class _Table:
    """The pieces as columns [N]; starts and stops are places in the list of boundaries."""

    stage: Places
    start: Places
    stop: Places
    whole: Flags

    def runs(self, place: int) -> Flags:
        """Who may run the layers from this boundary to the next."""
        return (self.start <= place) & (place < self.stop)

    def cells(self, places: int) -> int:
        """Hops between two pieces, at all boundaries together."""
        import numpy as np

        def at(which: Places) -> Places:
            return np.bincount(which, minlength=places)

        split = ~self.whole
        inside = np.cumsum(at(self.start[split]) - at(self.stop[split]))
        enter = inside + at(self.start[self.whole])
        leave = inside - at(self.start[split]) + at(self.stop[split]) + at(self.stop[self.whole])
        return int((enter * leave)[1:-1].sum())

    def may_enter(self, place: int) -> Places:
        entered: Flags = self.runs(place) & (~self.whole | (self.start == place))
        return entered.nonzero()[0]

    def may_leave(self, place: int) -> Places:
        reached: Flags = (self.start < place) & (place <= self.stop)
        left: Flags = reached & (~self.whole | (self.stop == place))
        return left.nonzero()[0]


def _filled(
    bounds: Sequence[int], table: _Table, heads: Places, costs: Costs
) -> tuple[Floats, list[Places]]:
    """Seconds [H, N] of the cheapest way from each head that has run all layers in each piece,
    and for each boundary where it came from: another piece, or itself where it stayed. Without a
    ring there is one row for all heads.
    """
    import numpy as np

    rows = len(heads) if costs.back is not None else 1
    fixed, layer = costs.fixed[table.stage], costs.layer[table.stage]
    best = np.full((rows, len(table.stage)), np.inf)
    best[np.arange(len(heads)) % rows, heads] = (fixed + costs.first[table.stage])[heads]
    came: list[Places] = []
    for place, (here, there) in enumerate(pairwise(bounds)):
        source = np.tile(np.arange(len(table.stage)), (rows, 1))
        if place:
            _hopped(best, source, table, fixed, costs.hop, place)
        best[:, ~table.runs(place)] = np.inf
        best += (there - here) * layer
        came.append(source)
    return best, came


def _hopped(
    best: Floats, source: Places, table: _Table, fixed: Floats, hop: Floats, place: int
) -> None:
    """Change `best`, and `source` with it, where coming from another piece is cheaper."""
    import numpy as np

    leave, enter = table.may_leave(place), table.may_enter(place)
    leave = leave[np.isfinite(best[:, leave]).any(axis=0)]
    if not len(leave) or not len(enter):
        return
    hops = hop[np.ix_(table.stage[leave], table.stage[enter])]
    arrived = best[:, leave, None] + hops  # [H, from, to]
    nearest = arrived.argmin(axis=1)
    seconds = np.take_along_axis(arrived, nearest[:, None], axis=1)[:, 0] + fixed[enter]
    fresh = table.start[enter] == place  # nobody can have stayed in what begins here
    stayed = np.where(fresh, np.inf, best[:, enter])
    better = seconds < stayed
    best[:, enter] = np.where(better, seconds, stayed)
    source[:, enter] = np.where(better, leave[nearest], source[:, enter])


def _closed(best: Floats, table: _Table, heads: Places, costs: Costs, end: int) -> Floats:
    """With what the last stage adds, the way back included."""
    import numpy as np

    total = best + costs.last[table.stage]
    total[:, table.stop != end] = np.inf
    if costs.back is not None:
        total += costs.back[np.ix_(table.stage, table.stage[heads])].T
    return total


def _traced(
    came: Sequence[Places], bounds: Sequence[int], table: _Table, head: int, tail: int
) -> tuple[Part, ...]:
    """The parts of the way that ends in this piece, from the last boundary to the first."""
    parts: list[Part] = []
    piece, stop = tail, bounds[-1]
    for place in range(len(came) - 1, -1, -1):
        before = int(came[place][head, piece])
        if before != piece or place == 0:
            parts.append((int(table.stage[piece]), Slice(bounds[place], stop)))
            stop = bounds[place]
        piece = before
    return tuple(reversed(parts))
