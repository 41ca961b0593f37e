"""Which layers are held, by how many, and whether a route can exist.

A stage may run a part of its slice, so a model is *covered* when each layer is held by somebody.
Other makes of engines run all of a slice or nothing (`whole`): there slices have to meet end to
end, and 0:5 and 3:8, which hold every one of 8 layers, make no route.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, groupby

from ..units import Slice
from .capacity import Capacities


def coverage(layers: int, slices: Iterable[Slice]) -> list[int]:
    """For each layer the number of slices that hold it."""
    changes = [0] * (layers + 1)
    for held in slices:
        if held.start < layers:
            changes[held.start] += 1
            changes[min(held.stop, layers)] -= 1
    return list(accumulate(changes[:layers]))


def missing(layers: int, slices: Iterable[Slice]) -> list[Slice]:
    """The runs of layers that nobody holds."""
    return _runs(coverage(layers, slices), 0)


def weakest(layers: int, slices: Iterable[Slice]) -> list[Slice]:
    """The runs of layers with the fewest holders."""
    counts = coverage(layers, slices)
    return _runs(counts, min(counts))


def _runs(counts: list[int], wanted: int) -> list[Slice]:
    runs = [list(run) for _, run in groupby(range(len(counts)), key=counts.__getitem__)]
    return [Slice(run[0], run[-1] + 1) for run in runs if counts[run[0]] == wanted]


def reached(slices: Iterable[Slice]) -> set[int]:
    """Boundaries that whole slices, laid end to end from layer 0, can reach."""
    found = {0}
    for held in sorted(slices):
        if held.start in found:
            found.add(held.stop)
    return found


def finishing(layers: int, slices: Iterable[Slice]) -> set[int]:
    """Boundaries from which whole slices, laid end to end, can reach the end."""
    within = (held for held in slices if held.stop <= layers)
    mirrored = (Slice(layers - held.stop, layers - held.start) for held in within)
    return {layers - boundary for boundary in reached(mirrored)}


def covered(layers: int, slices: Iterable[Slice], *, whole: bool = False) -> bool:
    """True when a route exists."""
    return layers in reached(slices) if whole else not missing(layers, slices)


def coverable(layers: int, pool: Sequence[Capacities]) -> bool:
    """True when these nodes, none of them pinned, could cover the model. Exact.

    Slices can be laid end to end in any order, so only the two ends matter: one node does it alone,
    or one takes the embedding, another the head, and all others go between.
    """
    if any(one.both >= layers for one in pool):
        return True
    if layers == 1:
        return False
    between = [min(one.middle, layers) for one in pool]
    total = sum(between)
    return any(
        total - between[i] - between[j] + first.embedding + last.head >= layers
        for i, first in enumerate(pool)
        for j, last in enumerate(pool)
        if i != j and first.embedding and last.head
    )
