"""The most that a placement can carry, as a linear programme: what the rest is measured against.

For tests, benchmarks and explanations, never on a node's hot path. scipy does the solving; it is a
development dependency, imported when a bound is asked for.

i, j stages · l layers · x[i,l] tokens/s that i computes at l · y[i,j,l] tokens/s handed on before l
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..units import NodeId, Slice

Bandwidth = Callable[[NodeId, NodeId], float]  # bytes/s one way, infinite where nothing binds


@dataclass(frozen=True, slots=True)
class Worker:
    """A stage: seconds of one token in one layer, at the batch that it is thought to run.

    `room` is its KV cache in tokens times layers, None where that does not bind. A `whole` one
    runs all of its layers or none.
    """

    node: NodeId
    layers: Slice
    seconds: float
    room: float | None = None
    whole: bool = False


class Handover(NamedTuple):
    """Tokens that `source` hands to `target`, which goes on at `layer`; None is the client."""

    source: NodeId | None
    target: NodeId | None
    layer: int


@dataclass(frozen=True)
class Flow:
    """The best use of a placement. `handed` is in tokens/s; what stays on a node is not in it."""

    tokens_per_s: float
    computed: Mapping[tuple[NodeId, int], float] = field(default_factory=dict)  # of each layer
    handed: Mapping[Handover, float] = field(default_factory=dict)

    def share(self, worker: Worker) -> float:
        """The part of its time that it computes in."""
        layers = range(worker.layers.start, worker.layers.stop)
        return worker.seconds * sum(self.computed.get((worker.node, at), 0.0) for at in layers)


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """What a token of an answer stands for, its part of the prompt included.

    `bytes` go over each link that it takes; `held` is the room that it keeps, in tokens times
    seconds: context length x the time a request stays / the tokens of its answer.
    """

    bytes: float = 0.0
    held: float = 0.0


class Mixture(NamedTuple):
    """Requests with `prompt` tokens in and `answer` tokens out, in the mean."""

    prompt: float
    answer: float

    def seconds(self, prompt_s: float, decode_s: float) -> float:
        """Of a layer and answered token: `prompt_s` for a whole prompt, `decode_s` for a token."""
        return prompt_s / self.answer + decode_s

    def traffic(self, activation_bytes: float, stay_s: float = 0.0) -> Traffic:
        """`stay_s` is how long a request stays: its KV lies there for as long."""
        each = 1 + self.prompt / self.answer
        context = self.prompt + self.answer / 2
        return Traffic(bytes=activation_bytes * each, held=context * stay_s / self.answer)


def placement_free(total_layers: int, seconds: Iterable[float]) -> float:
    """Tokens/s that nodes with these times for a layer cannot exceed, wherever the layers lie."""
    return sum(1 / each for each in seconds) / total_layers


def max_flow(
    total_layers: int,
    workers: Sequence[Worker],
    bandwidth: Bandwidth | None = None,
    traffic: Traffic | None = None,
) -> Flow:
    """The most tokens/s through all layers, and a way to carry them.

    No stage computes for more than a second each second, holds more KV than its room, or sends
    more to another one than their link carries. One node has one worker. Raises ValueError for
    workers that cannot be, ImportError without scipy.
    """
    traffic = traffic or Traffic()
    _check(total_layers, workers)
    if not _covers(total_layers, workers):
        return Flow(0.0)
    problem = _Problem(total_layers, workers, traffic)
    problem.add_arcs(bandwidth if traffic.bytes else None)
    return problem.solve()


def _check(total_layers: int, workers: Sequence[Worker]) -> None:
    if len({worker.node for worker in workers}) < len(workers):
        raise ValueError("a node has one worker")
    for worker in workers:
        if not (worker.seconds > 0 and math.isfinite(worker.seconds)):
            raise ValueError(f"a layer takes {worker.seconds} seconds on {worker.node}")
        if worker.layers.stop > total_layers:
            raise ValueError(f"{worker.node} holds {worker.layers} of {total_layers} layers")


def _covers(total_layers: int, workers: Sequence[Worker]) -> bool:
    held = {at for one in workers for at in range(one.layers.start, one.layers.stop)}
    return len(held) == total_layers


class _Arc(NamedTuple):
    """A variable: tokens/s from one worker (None = the client, or a pool) to another."""

    source: int | None
    target: int | None
    layer: int


class _Problem:
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
        self.upper = _Rows()
        self.equal = _Rows()

    def add_arcs(self, bandwidth: Bandwidth | None) -> None:
        if bandwidth is None:
            self._pooled()
        else:
            self._paired(bandwidth)
        self._limit_workers()

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
            held = range(worker.layers.start, worker.layers.stop)
            places = [place for layer in held for place in into[i, layer]]
            self.upper.add([(place, worker.seconds) for place in places], 1.0)
            if worker.room is not None and self.traffic.held:
                self.upper.add([(place, self.traffic.held) for place in places], worker.room)
            if worker.whole:
                self._run_whole(into, i, held)

    def _run_whole(self, into: Mapping[tuple[int, int], list[int]], i: int, held: range) -> None:
        first = [(place, 1.0) for place in into[i, held.start]]
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

        gain = [-1.0 if arc.layer == 0 else 0.0 for arc in self.arcs]
        solved = linprog(
            gain,
            A_ub=self.upper.matrix(len(self.arcs)),
            b_ub=self.upper.right,
            A_eq=self.equal.matrix(len(self.arcs)) if self.equal.right else None,
            b_eq=self.equal.right or None,
            method="highs",
        )
        if not solved.success:
            raise ValueError(f"the bound was not found: {solved.message}")
        return self._flow(-float(solved.fun), [float(value) for value in solved.x])

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
