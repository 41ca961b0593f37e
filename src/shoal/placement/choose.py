"""Where a free node helps most, given what the others hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..units import Slice
from .capacity import Capacities
from .coverage import coverage, finishing, reached

Score = tuple[bool, int, bool, int, int, int, int]


def choose_slice(layers: int, capacities: Capacities, taken: Sequence[Slice]) -> Slice | None:
    """The slice to load; None when not one layer fits.

    `taken` is what others serve or are loading. Best is what completes a route; then what the
    fewest hold; then what meets the others' boundaries; then the most of the weakest layers with
    the least beside them.
    """
    counts = coverage(layers, taken)
    before, after = reached(taken), finishing(layers, taken)
    edges_before = {0} | {held.stop for held in taken}
    edges_after = {layers} | {held.start for held in taken}

    def score(window: Slice) -> Score:
        inside = counts[window.start : window.stop]
        completes = window.start in before and window.stop in after
        meets = (window.start in edges_before) + (window.stop in edges_after)
        weakest = min(inside)
        most = inside.count(weakest)
        return (not completes, weakest, not meets, -most, -meets, len(window), window.start)

    stops = edges_before | edges_after
    return min(_windows(layers, capacities, stops), key=score, default=None)


def _windows(layers: int, capacities: Capacities, stops: set[int]) -> Iterator[Slice]:
    """From each layer on: as far as it fits, and to each of `stops` on the way."""
    for start in range(layers):
        possible = capacities.stops(start, layers)
        if possible:
            yield from (Slice(start, stop) for stop in {possible[-1], *stops} if stop in possible)
        if capacities.reaches_end(start, layers):
            yield Slice(start, layers)
