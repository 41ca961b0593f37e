"""The ring of stages on which a session is expected to take the least time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random

from ..errors import NoRoute
from ..hardware import Speed
from ..units import NodeId, Seconds, Slice
from .coverage import missing
from .expect import CROWDED_S, Network, Work, stage_cost
from .model import Held
from .ring import Costs, Piece, cheapest_way, without

MAX_STAGES = 128  # that a route is chosen from: the search grows with the square of their number
SPREAD = 0.05  # routes that take so much longer than the best are as good


@dataclass(frozen=True, slots=True)
class Trip:
    """What a route is wanted for.

    `keep` are stations that stay, with what each of them runs: only the layers between are planned.
    """

    layers: int
    gateway: NodeId
    need_tokens: int = 1  # the longest the session can become
    work: Work = Work()
    avoid: frozenset[NodeId] = frozenset()
    keep: tuple[tuple[NodeId, Slice], ...] = ()
    compute: str | None = None  # None = any class, but one for all of the ring
    model: str = "this model"


@dataclass(frozen=True, slots=True)
class Route:
    """Stages, and what each of them runs: together the whole model, in the order of its layers."""

    stages: tuple[Held, ...]
    parts: tuple[Slice, ...]
    compute: str
    seconds: Seconds  # expected, for all of the session's work

    @property
    def hops(self) -> tuple[tuple[NodeId, Slice], ...]:
        return tuple(zip((stage.node for stage in self.stages), self.parts, strict=True))


def cheapest_route(
    trip: Trip, held: Sequence[Held], network: Network, chance: Random | None = None
) -> Route:
    """The ring of stages that serve, all of one compute class, with the least expected time: the
    stages' steps, prompt and queues, every hop, and the one from the last stage back to the first.

    A stage may run a part of its layers, unless it is `whole`. One with less KV room than the
    session may need is a last resort. With `chance` it is one of the routes that take at most
    SPREAD longer than the best, so that gateways that decide alike do not all choose the same.
    Raises NoRoute, which says what is missing from the model.
    """
    usable = _usable(trip, held)
    kept = _kept(trip, held)
    classes: dict[str, list[Held]] = {}
    for stage in usable:
        if stage.state == "serving":
            classes.setdefault(stage.compute, []).append(stage)
    if kept:
        classes = {kept[0].compute: classes.get(kept[0].compute, [])}
    routes = [_ring(trip, kept, stages, network, chance) for _, stages in sorted(classes.items())]
    found = [route for route in routes if route is not None]
    if not found:
        there = zip(kept, trip.keep, strict=True)
        stay = [replace(stage, layers=part, state="serving") for stage, (_, part) in there]
        raise no_route(trip.layers, [*usable, *stay], trip.model)
    return min(found, key=lambda route: (crowded(route, trip.need_tokens), route.seconds))


def _usable(trip: Trip, held: Iterable[Held]) -> list[Held]:
    """Who may be asked, in an order that is the same everywhere."""
    kept = {node for node, _ in trip.keep}
    usable = [
        stage
        for stage in held
        if stage.node not in trip.avoid
        and stage.node not in kept
        and stage.layers.stop <= trip.layers
        and trip.compute in (None, stage.compute)
    ]
    return sorted(usable, key=lambda stage: (stage.layers, stage.node))


def _kept(trip: Trip, held: Iterable[Held]) -> list[Held]:
    """The stations that stay, as far as they are still announced."""
    known = {(stage.node, stage.compute): stage for stage in held}
    out: list[Held] = []
    for node, part in trip.keep:
        stages = [each for (who, how), each in known.items() if who == node]
        right = [each for each in stages if trip.compute in (None, each.compute)]
        out.append(right[0] if right else _unknown(node, part, trip.compute or ""))
    return out


def _unknown(node: NodeId, part: Slice, compute: str) -> Held:
    return Held(node, part, "serving", compute, Speed(), 0, 0, 0)


def _ring(
    trip: Trip,
    kept: Sequence[Held],
    stages: Sequence[Held],
    network: Network,
    chance: Random | None,
) -> Route | None:
    """The cheapest ring over the stations that stay and these stages."""
    all_stages = [*kept, *stages]
    pieces = [
        Piece(len(kept) + place, stage.layers.start, stage.layers.stop, stage.whole)
        for place, stage in enumerate(stages)
    ]
    for _, part in trip.keep:
        pieces = without(pieces, part.start, part.stop, lambda piece: True)
    pieces += [Piece(n, part.start, part.stop, True) for n, (_, part) in enumerate(trip.keep)]
    costs = ring_costs(trip, all_stages, network, chance, len(kept))
    way = cheapest_way(trip.layers, pieces, costs)
    if way is None:
        return None
    chosen = tuple(all_stages[stage] for stage, _ in way[1])
    parts = tuple(part for _, part in way[1])
    seconds = route_seconds(trip, chosen, parts, network)
    return Route(chosen, parts, all_stages[-1].compute, Seconds(seconds))


def ring_costs(
    trip: Trip,
    stages: Sequence[Held],
    network: Network,
    chance: Random | None = None,
    stay: int = 0,  # so many of the first stages have their room already
) -> Costs:
    """What `route_seconds` adds up, for the search; with `chance` each stage is a little dearer.

    Because nothing is more than SPREAD dearer, what is cheapest then takes at most so much longer.
    """
    import numpy as np

    work, nodes = trip.work, tuple(stage.node for stage in stages)
    each = [stage_cost(stage, work) for stage in stages]
    dearer = np.array([1 + SPREAD * chance.random() if chance else 1.0 for _ in stages])
    crowded = [n >= stay and stage.free_tokens < trip.need_tokens for n, stage in enumerate(stages)]
    once, token = network.tables(nodes)
    to_first = [network.pair(trip.gateway, node)[0] for node in nodes]
    from_last = [network.pair(node, trip.gateway)[0] for node in nodes]
    return Costs(
        nodes,
        fixed=np.array([cost.fixed for cost in each]) * dearer + np.array(crowded) * CROWDED_S,
        layer=np.array([cost.layer for cost in each]) * dearer,
        hop=(work.tokens * once + (work.prompt + work.tokens) * token) * dearer,
        back=work.tokens * once,
        first=np.array(to_first),
        last=np.array([cost.sample for cost in each]) * dearer + np.array(from_last),
    )


def route_seconds(
    trip: Trip, stages: Sequence[Held], parts: Sequence[Slice], network: Network
) -> float:
    """The time that a session is expected to take on this ring, without waiting for room."""
    work = trip.work
    costs = [stage_cost(stage, work) for stage in stages]
    at_stages = sum(cost.seconds(part) for cost, part in zip(costs, parts, strict=True))
    nodes = [stage.node for stage in stages]
    hops = sum(network.hop(a, b, work) for a, b in pairwise(nodes))
    ends = network.pair(trip.gateway, nodes[0])[0] + network.pair(nodes[-1], trip.gateway)[0]
    return at_stages + costs[-1].sample + hops + network.back(nodes[-1], nodes[0], work) + ends


def crowded(route: Route, need_tokens: int) -> int:
    """How many of its stages have less room than the session may need."""
    return sum(stage.free_tokens < need_tokens for stage in route.stages)


def few_of_each(
    held: Collection[Held],
    need_tokens: int,
    most: int = MAX_STAGES,
    keep: frozenset[NodeId] = frozenset(),
) -> list[Held]:
    """At most so many of them, beside those to `keep`: those that together hold every layer (of
    whole ones, every slice), then those that hold it a second time, and so on; the quickest first.
    """
    if len(held) <= most:
        return list(held)
    times = _Times(held)
    best_first = sorted(held, key=lambda one: (one.free_tokens < need_tokens, one.layer_seconds))
    ranked = [(times.held(stage), stage) for stage in best_first]
    best = [stage for _, stage in sorted(ranked, key=lambda pair: pair[0])[:most]]
    there = {stage.node for stage in best}
    return [*best, *(stage for stage in held if stage.node in keep - there)]


class _Times:
    """How often each layer is held, in each class, by the stages that were counted so far."""

    def __init__(self, held: Iterable[Held]) -> None:
        import numpy as np

        layers = max(stage.layers.stop for stage in held)
        self._layers = {stage.compute: np.zeros(layers, dtype=int) for stage in held}
        self._slices: defaultdict[tuple[str, Slice], int] = defaultdict(int)

    def held(self, stage: Held) -> int:
        """The least of its layers is held so often, without this stage; count it."""
        part, key = stage.layers, (stage.compute, stage.layers)
        counts = self._layers[stage.compute][part.start : part.stop]
        before = self._slices[key] if stage.whole else int(counts.min())
        if stage.state == "serving":
            counts += 1
            self._slices[key] += 1
        return before


def no_route(layers: int, usable: Sequence[Held], model: str) -> NoRoute:
    """Why these stages make no ring, and what would help."""
    serving = [stage.layers for stage in usable if stage.state == "serving"]
    coming = [stage.layers for stage in usable if stage.state == "joining"]
    gaps = missing(layers, serving)
    if gaps and not missing(layers, serving + coming):
        return NoRoute(
            f"no route for {model}: {named(gaps)} still loading", hint="again in a moment"
        )
    if gaps:
        gaps = missing(layers, serving + coming)
        return NoRoute(
            f"no route for {model}: nobody holds {named(gaps)}",
            hint=f"shoal up --model {model} on another machine",
        )
    if all(missing(layers, _serving_as(usable, one.compute)) for one in usable):
        return NoRoute(
            f"no route for {model}: its layers are held in different compute classes",
            hint="start the nodes with the same --dtype and --quant",
        )
    return NoRoute(
        f"no route for {model}: its layers are all held, but by engines that run all of their "
        "layers or none, and these do not meet end to end",
        hint="pin them with --layers so that one starts where another stops",
    )


def _serving_as(usable: Sequence[Held], compute: str) -> list[Slice]:
    right = (stage for stage in usable if stage.compute == compute and stage.state == "serving")
    return [stage.layers for stage in right]


def named(slices: Iterable[Slice]) -> str:
    """People count layers inclusively: Slice(3, 6) is 'layers 3–5'."""
    parts = [
        f"{part.start}–{part.stop - 1}" if len(part) > 1 else str(part.start) for part in slices
    ]
    return f"layer{'s' if len(parts) > 1 or '–' in parts[0] else ''} {', '.join(parts)}"
