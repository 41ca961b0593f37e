"""The most that a placement can carry, as a linear programme: what the rest is measured against.

For tests, benchmarks and explanations, never on a node's hot path. scipy does the solving; it is a
development dependency, imported when a bound is asked for.

i, j stages · l layers · x[i,l] tokens/s that i computes at l · y[i,j,l] tokens/s handed on before l
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..units import NodeId, Slice

Bandwidth = Callable[[NodeId, NodeId], float]  # bytes/s one way, infinite where nothing binds


@dataclass(frozen=True, slots=True)
class Worker:
    """A stage: seconds of one token in one layer, at the batch that it is thought to run.

    `step_s` is what a step takes in each layer however few tokens are in it; `seconds` is then what
    each token adds. `room` is its KV cache in tokens times layers, None where that does not bind. A
    `whole` one runs all of its layers or none.
    """

    node: NodeId
    layers: Slice
    seconds: float
    room: float | None = None
    whole: bool = False
    step_s: float = 0.0


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
    seconds: context length x the time a request stays / the tokens of its answer. With no more than
    `in_flight` requests at once, each of which has one token under way, what a token waits for
    binds too: every step that it is in, and `hops_s` of links in all.
    """

    bytes: float = 0.0
    held: float = 0.0
    in_flight: float = math.inf
    hops_s: float = 0.0


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
    from .programme import solve  # it knows the types above

    return solve(total_layers, workers, bandwidth if traffic.bytes else None, traffic)


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
