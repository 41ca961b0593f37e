"""The linear programme behind `bound.py`: its variables, its rows, and what they say.

i, j workers · l layers · a variable is an arc: tokens/s into a layer of a worker
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..units import NodeId
from .bound import Bandwidth, Flow, Handover, Traffic, Worker

TANGENTS = (0.0, 0.2, 0.4, 0.55, 0.7, 0.8, 0.87, 0.92, 0.96)  # where a load's curve is touched


def solve(
    total_layers: int, workers: Sequence[Worker], bandwidth: Bandwidth | None, traffic: Traffic
) -> Flow:
    """Raises ValueError when the solver gives up, ImportError without scipy."""
    programme = _Programme(total_layers, workers, traffic)
    programme.add_arcs(bandwidth)
    return programme.solve()


class _Arc(NamedTuple):
    """A variable: tokens/s from one worker (None = the client, or a pool) to another."""

    source: int | None
    target: int | None
    layer: int


class _Programme:
    """Variables are arcs: into a layer of a worker, and out of the last layer.

    Where no link binds, what leaves a layer goes into a pool from which the next one draws, and
    the number of arcs does not grow with the square of the workers.
    """

    def __init__(self, total_layers: int, workers: Sequence[Worker], traffic: Traffic) -> None:
        self.layers, self.workers, self.traffic = total_layers, workers, traffic
        self.holders = [
            [i for i, one in enumerate(workers) if one.layers.start <= at < one.layers.stop]
            for at in range(total_layers)
        ]
        self.arcs: list[_Arc] = []
        self.more = 0  # variables behind the arcs
        self.upper = _Rows()
        self.equal = _Rows()

    def add_arcs(self, bandwidth: Bandwidth | None) -> None:
        if bandwidth is None:
            self._pooled()
        else:
            self._paired(bandwidth)
        self._limit_workers()
        if math.isfinite(self.traffic.in_flight):
            self._limit_in_flight()

    def _pooled(self) -> None:
        for layer, holders in enumerate(self.holders):
            self.arcs += [_Arc(None, j, layer) for j in holders]
        into = self._into()
        first = [(place, 1.0) for j in self.holders[0] for place in into[j, 0]]
        for layer in range(1, self.layers):
            here = [(place, -1.0) for j in self.holders[layer] for place in into[j, layer]]
            self.equal.add([*first, *here], 0.0)

    def _paired(self, bandwidth: Bandwidth) -> None:
        self.arcs = [_Arc(None, j, 0) for j in self.holders[0]]
        for layer in range(1, self.layers):
            pairs = [(i, j) for i in self.holders[layer - 1] for j in self.holders[layer]]
            self.arcs += [_Arc(i, j, layer) for i, j in pairs if self._may_pass(i, j, layer)]
        self._conserve()
        self._limit_links(bandwidth)

    def _may_pass(self, i: int, j: int, layer: int) -> bool:
        source, target = self.workers[i], self.workers[j]
        leaves = not source.whole or source.layers.stop == layer
        enters = not target.whole or target.layers.start == layer
        return i == j or (leaves and enters)

    def _conserve(self) -> None:
        into, out = self._into(), self._out()
        for layer in range(self.layers - 1):
            for i in self.holders[layer]:
                came = [(place, 1.0) for place in into[i, layer]]
                went = [(place, -1.0) for place in out[i, layer + 1]]
                self.equal.add([*came, *went], 0.0)

    def _limit_links(self, bandwidth: Bandwidth) -> None:
        between: dict[tuple[int, int], list[int]] = defaultdict(list)
        for place, arc in enumerate(self.arcs):
            if arc.source is not None and arc.target is not None and arc.source != arc.target:
                between[arc.source, arc.target].append(place)
        for (i, j), places in between.items():
            limit = bandwidth(self.workers[i].node, self.workers[j].node)
            if math.isfinite(limit):
                self.upper.add([(place, self.traffic.bytes) for place in places], limit)

    def _limit_workers(self) -> None:
        into = self._into()
        for i, worker in enumerate(self.workers):
            held = list(worker.layers)
            places = [place for layer in held for place in into[i, layer]]
            self.upper.add([(place, worker.seconds) for place in places], 1.0)
            if worker.room is not None and self.traffic.held:
                self.upper.add([(place, self.traffic.held) for place in places], worker.room)
            if worker.whole:
                self._run_whole(into, i, held)

    def _limit_in_flight(self) -> None:
        """Of w layers times tokens a second a worker has at least step_s w / (1 - seconds w) tokens
        in its steps: as many as come while one step lasts. That curve is bent upwards, and lies
        above each of its tangents; a variable behind the arcs stands for it.
        """
        first = len(self.arcs)
        into = self._into()
        for i, worker in enumerate(self.workers):
            places = [place for layer in worker.layers for place in into[i, layer]]
            for load in TANGENTS if worker.step_s else ():
                slope = worker.step_s / (1 - load) ** 2
                below = slope * load * load / worker.seconds  # the tangent at w = 0, negated
                row = [(place, slope) for place in places]
                self.upper.add([*row, (first + i, -1.0)], below)
        hops = [(at, self.traffic.hops_s) for at, arc in enumerate(self.arcs) if arc.layer == 0]
        waiting = [(first + i, 1.0) for i in range(len(self.workers))]
        self.more = len(self.workers)
        self.upper.add([*hops, *waiting], self.traffic.in_flight)

    def _run_whole(
        self, into: Mapping[tuple[int, int], list[int]], i: int, held: Sequence[int]
    ) -> None:
        first = [(place, 1.0) for place in into[i, held[0]]]
        for layer in held[1:]:
            self.equal.add([*first, *((place, -1.0) for place in into[i, layer])], 0.0)

    def _into(self) -> dict[tuple[int, int], list[int]]:
        """The places of the arcs into a layer of a worker."""
        into: dict[tuple[int, int], list[int]] = defaultdict(list)
        for place, arc in enumerate(self.arcs):
            if arc.target is not None:
                into[arc.target, arc.layer].append(place)
        return into

    def _out(self) -> dict[tuple[int, int], list[int]]:
        out: dict[tuple[int, int], list[int]] = defaultdict(list)
        for place, arc in enumerate(self.arcs):
            if arc.source is not None:
                out[arc.source, arc.layer].append(place)
        return out

    def solve(self) -> Flow:
        from scipy.optimize import linprog

        gain = [-1.0 if arc.layer == 0 else 0.0 for arc in self.arcs] + [0.0] * self.more
        solved = linprog(
            gain,
            A_ub=self.upper.matrix(len(gain)),
            b_ub=self.upper.right,
            A_eq=self.equal.matrix(len(gain)) if self.equal.right else None,
            b_eq=self.equal.right or None,
            method="highs",
        )
        if not solved.success:
            raise ValueError(f"the bound was not found: {solved.message}")
        return self._flow(
            -float(solved.fun), [float(value) for value in solved.x[: len(self.arcs)]]
        )

    def _flow(self, tokens_per_s: float, values: Sequence[float]) -> Flow:
        computed: dict[tuple[NodeId, int], float] = {}
        handed: dict[Handover, float] = {}
        for arc, value in zip(self.arcs, values, strict=True):
            source, target = self._node(arc.source), self._node(arc.target)
            if target is not None and value > 0:
                computed[target, arc.layer] = computed.get((target, arc.layer), 0.0) + value
            if source != target and value > 0 and (source is not None or arc.layer == 0):
                handed[Handover(source, target, arc.layer)] = value
        return Flow(tokens_per_s, computed, handed)

    def _node(self, worker: int | None) -> NodeId | None:
        return None if worker is None else self.workers[worker].node


class _Rows:
    """Rows of a sparse matrix, and their right-hand sides."""

    def __init__(self) -> None:
        self.right: list[float] = []
        self._row: list[int] = []
        self._column: list[int] = []
        self._value: list[float] = []

    def add(self, terms: Iterable[tuple[int, float]], right: float) -> None:
        """Terms of one variable that come twice are summed."""
        for column, value in terms:
            self._row.append(len(self.right))
            self._column.append(column)
            self._value.append(value)
        self.right.append(right)

    def matrix(self, columns: int) -> Any:
        from scipy.sparse import coo_array

        shape = (len(self.right), columns)
        return coo_array((self._value, (self._row, self._column)), shape=shape).tocsr()
