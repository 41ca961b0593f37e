"""One model over a given row of nodes, in proportion to their speed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
from math import inf

from ..errors import NoCapacity
from ..units import Slice
from .capacity import Capacities

Fit = Callable[[int, Slice], bool]
Work = Callable[[int, Slice], float]


def split(
    layer_bytes: Sequence[int],
    nodes: int | Sequence[float],
    *,
    head_bytes: int = 0,
    capacities: Sequence[Capacities] | None = None,
) -> list[Slice]:
    """One slice for each node, in their order; the slowest stage is as quick as can be.

    `nodes` is how many equal ones, or their speeds in any one unit. Decoding reads every byte of a
    stage once a token, so bytes stand for time, the head's included; give `head_bytes` for that.
    Raises NoCapacity when there are more nodes than layers or the capacities do not suffice.
    """
    layers = len(layer_bytes)
    speeds = [1.0] * nodes if isinstance(nodes, int) else list(nodes)
    sums = list(accumulate(layer_bytes, initial=0))

    def seconds(node: int, part: Slice) -> float:
        work = sums[part.stop] - sums[part.start] + head_bytes * (part.stop == layers)
        return work / speeds[node]

    def fits(node: int, part: Slice) -> bool:
        return capacities is None or capacities[node].fits(part, layers)

    def quick(node: int, part: Slice) -> bool:
        return fits(node, part) and seconds(node, part) <= slowest

    def uneven(node: int, part: Slice) -> float:
        return seconds(node, part) ** 2 * speeds[node]

    slowest, _ = _best(layers, len(speeds), fits, seconds, max)
    if slowest == inf:
        raise NoCapacity(f"{layers} layers do not fit on {len(speeds)} nodes with one slice each")
    _, stops = _best(layers, len(speeds), quick, uneven, float.__add__)
    return [Slice(start, stop) for start, stop in zip((0, *stops), stops, strict=False)]


def _best(
    layers: int, nodes: int, fits: Fit, cost: Work, joined: Callable[[float, float], float]
) -> tuple[float, tuple[int, ...]]:
    """The cheapest way to give all layers to the nodes in their order: (cost, stops)."""

    @cache
    def rest(node: int, start: int) -> tuple[float, tuple[int, ...]]:
        if node == nodes:
            return (0.0 if start == layers else inf), ()
        found: tuple[float, tuple[int, ...]] = (inf, ())
        for stop in range(start + 1, layers - (nodes - node - 1) + 1):
            part = Slice(start, stop)
            if fits(node, part):
                further, stops = rest(node + 1, stop)
                found = min(found, (joined(cost(node, part), further), (stop, *stops)))
        return found

    return rest(0, 0)
