"""The cheapest ring of stages for one session."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..errors import NoRoute
from ..units import NodeId, Seconds, Slice
from .coverage import covered, missing
from .model import Held

Latency = Callable[[NodeId, NodeId], float]  # one way, seconds

Cost = tuple[int, float, float, tuple[NodeId, ...]]  # stages without room, ring, ends, who


@dataclass(frozen=True, slots=True)
class Route:
    """Stages that together are the whole model, in the order of their layers."""

    stages: tuple[Held, ...]
    compute: str
    seconds_per_token: Seconds  # once around the ring, queues and the way back to the head included

    @property
    def hops(self) -> tuple[tuple[NodeId, Slice], ...]:
        return tuple((stage.node, stage.layers) for stage in self.stages)


def cheapest_route(
    total_layers: int,
    held: Sequence[Held],
    latency: Latency,
    gateway: NodeId,
    need_tokens: int,
    avoid: frozenset[NodeId] = frozenset(),
    compute: str | None = None,
    model: str = "this model",
) -> Route:
    """The ring with the least time a token, of stages that serve, all of one compute class.

    Time is each stage's layers, overhead and queue, each hop's latency and the hop from the last
    stage back to the first. A stage with less KV room than `need_tokens` is a last resort. Among
    equal rings the nearest to `gateway` is taken, then the smallest node ids.
    Raises NoRoute, which says what is missing from `model`.
    """
    usable = [
        stage
        for stage in held
        if stage.node not in avoid
        and stage.layers.stop <= total_layers
        and compute in (None, stage.compute)
    ]
    serving = [stage for stage in usable if stage.state == "serving"]
    rings = _rings(total_layers, serving, _remembered(latency), gateway, need_tokens)
    best = min(rings, key=lambda ring: (ring[0], ring[1][0].compute), default=None)
    if best is None:
        raise no_route(total_layers, usable, model)
    (_, seconds, _, _), stages = best
    return Route(stages, stages[0].compute, Seconds(seconds))


def _rings(
    layers: int, serving: list[Held], latency: Latency, gateway: NodeId, need_tokens: int
) -> Iterator[tuple[Cost, tuple[Held, ...]]]:
    """The cheapest ring from each first stage, for each compute class."""
    classes: dict[str, dict[int, list[Held]]] = defaultdict(lambda: defaultdict(list))
    for stage in sorted(serving, key=lambda stage: (stage.layers, stage.node)):
        classes[stage.compute][stage.layers.start].append(stage)
    for by_start in classes.values():
        for first in by_start[0]:
            paths = _paths(layers, by_start, first, latency, need_tokens)
            closed = [_closed(path, latency, gateway) for path in paths]
            if closed:
                yield min(closed, key=lambda ring: ring[0])


Path = tuple[Cost, tuple[Held, ...]]


def _paths(
    layers: int, by_start: dict[int, list[Held]], first: Held, latency: Latency, need_tokens: int
) -> list[Path]:
    """The cheapest path from `first` to each last stage. Stages are visited by their start."""
    arrived: dict[int, dict[NodeId, Path]] = defaultdict(dict)  # by boundary and the node there
    here = (int(first.free_tokens < need_tokens), first.step_seconds, 0.0, (first.node,))
    arrived[first.layers.stop][first.node] = here, (first,)
    for start in sorted(by_start):
        before = list(arrived.get(start, {}).values())
        for stage in by_start[start] if before else ():
            path = _joined(before, stage, latency, need_tokens)
            at_stop = arrived[stage.layers.stop]
            if stage.node not in at_stop or path[0] < at_stop[stage.node][0]:
                at_stop[stage.node] = path
    return list(arrived[layers].values())


def _joined(before: list[Path], stage: Held, latency: Latency, need_tokens: int) -> Path:
    """The cheapest way to come to `stage`."""

    def arrival(path: Path) -> tuple[int, float, tuple[NodeId, ...]]:
        (crowded, seconds, _, nodes), _ = path
        return crowded, seconds + latency(nodes[-1], stage.node), nodes

    path = min(before, key=arrival)
    crowded, seconds, nodes = arrival(path)
    crowded += stage.free_tokens < need_tokens
    cost = (crowded, seconds + stage.step_seconds, 0.0, (*nodes, stage.node))
    return cost, (*path[1], stage)


def _closed(path: Path, latency: Latency, gateway: NodeId) -> Path:
    """With the hop back to the head, and the gateway's distance from both ends."""
    (crowded, seconds, _, nodes), stages = path
    ends = latency(gateway, nodes[0]) + latency(nodes[-1], gateway)
    return (crowded, seconds + latency(nodes[-1], nodes[0]), ends, nodes), stages


def _remembered(latency: Latency) -> Latency:
    """Asks once for each pair; a node is no way from itself."""
    known: dict[tuple[NodeId, NodeId], float] = {}

    def seconds(a: NodeId, b: NodeId) -> float:
        if a == b:
            return 0.0
        if (a, b) not in known:
            known[a, b] = latency(a, b)
        return known[a, b]

    return seconds


def no_route(layers: int, usable: Sequence[Held], model: str) -> NoRoute:
    """Why these stages make no ring, and what would help."""
    serving = [stage.layers for stage in usable if stage.state == "serving"]
    coming = [stage.layers for stage in usable if stage.state == "joining"]
    gaps = missing(layers, serving)
    if gaps and not missing(layers, serving + coming):
        return NoRoute(
            f"no route for {model}: {named(gaps)} still loading", hint="try again in a moment"
        )
    if gaps:
        gaps = missing(layers, serving + coming)
        return NoRoute(
            f"no route for {model}: nobody holds {named(gaps)}",
            hint=f"shoal up --model {model} on another machine",
        )
    if covered(layers, serving):
        return NoRoute(
            f"no route for {model}: its layers are held in different compute classes",
            hint="start the nodes with the same --dtype and --quant",
        )
    return NoRoute(
        f"no route for {model}: its layers are all held, but the slices do not meet end to end",
        hint="pin them with --layers so that one starts where another stops",
    )


def named(slices: Iterable[Slice]) -> str:
    """People count layers inclusively: Slice(3, 6) is 'layers 3–5'."""
    parts = [
        f"{part.start}–{part.stop - 1}" if len(part) > 1 else str(part.start) for part in slices
    ]
    return f"layer{'s' if len(parts) > 1 or '–' in parts[0] else ''} {', '.join(parts)}"
