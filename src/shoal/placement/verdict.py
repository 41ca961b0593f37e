"""How well a mesh serves a model: is there a route, how quick is it, and what would one loss do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import NoRoute
from ..units import NodeId, Slice
from .coverage import coverage, missing, weakest
from .expect import Network, Work
from .flow import all_together
from .model import Held
from .routes import (
    MAX_STAGES,
    Route,
    Trip,
    cheapest_route,
    few_of_each,
    named,
    route_seconds,
)

TYPICAL = Work(prompt=128, tokens=256)  # what figures for people are about
ROUNDS = 64  # of the search for what all carry: enough for some dozens of different slices
SHORTEST_S = 1e-6  # for a token: who says less says nothing


@dataclass(frozen=True, slots=True)
class Needed:
    """A node without which these layers are gone."""

    node: NodeId
    layers: tuple[Slice, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Figures are of the best route, as busy as it is now; 0 when there is none."""

    ready: bool
    why_not: str = ""
    holders: int = 0  # of the layers that the fewest serve
    weakest: tuple[Slice, ...] = ()  # these layers
    missing: tuple[Slice, ...] = ()  # that nobody serves
    needed: tuple[Needed, ...] = ()
    first_token_s: float = 0.0  # after a prompt of typical length
    one_tokens_per_s: float = 0.0  # for one reader
    all_tokens_per_s: float = 0.0  # that all stages carry together, full


def verdict(trip: Trip, held: Sequence[Held], network: Network, most: int = MAX_STAGES) -> Verdict:
    """By these announcements, all of one model. At most so many stages of each kind of slice count
    for the figures: it takes about as many milliseconds as they are.
    """
    serving = [one for one in held if one.state == "serving" and one.layers.stop <= trip.layers]
    slices = [stage.layers for stage in serving]
    plain = Verdict(
        ready=False,
        holders=min(coverage(trip.layers, slices)),
        weakest=tuple(weakest(trip.layers, slices)),
        missing=tuple(missing(trip.layers, slices)),
    )
    trip = replace(trip, work=TYPICAL)
    try:
        route = cheapest_route(trip, few_of_each(held, 1, most), network)
    except NoRoute as error:
        return replace(plain, why_not=error.message)
    alike = [stage for stage in serving if stage.compute == route.compute]
    return replace(
        plain,
        ready=True,
        needed=tuple(needed(trip.layers, alike)) if _one_class(serving) else (),
        first_token_s=first_token_s(trip, route, network),
        one_tokens_per_s=1 / max(ring_s(trip, route, network), SHORTEST_S),
        all_tokens_per_s=all_together(
            trip.layers, few_of_each(serving, 0, 4 * most), TYPICAL, rounds=min(most, ROUNDS)
        ),
    )


def _one_class(serving: Sequence[Held]) -> bool:
    """Where there are more, one may stand in for another."""
    return len({stage.compute for stage in serving}) == 1


def needed(layers: int, serving: Sequence[Held]) -> list[Needed]:
    """Nodes that alone hold some layer, by their first one."""
    counts = coverage(layers, [stage.layers for stage in serving])
    found: list[Needed] = []
    for stage in sorted(serving, key=lambda one: (one.layers, one.node)):
        alone = [at for at in stage.layers if counts[at] == 1]
        if alone:
            others = [one.layers for one in serving if one is not stage]
            found.append(Needed(stage.node, tuple(missing(layers, others))))
    return found


def ring_s(trip: Trip, route: Route, network: Network) -> float:
    """Once around, with the other sessions that run: the time from one token to the next."""
    token = Work(prompt=0, tokens=1)
    idle = tuple(replace(stage, queue=0) for stage in route.stages)
    inside = replace(trip, work=token, gateway=idle[0].node)  # the reader's way delays, once
    ends = network.pair(idle[-1].node, idle[0].node)[0]
    return route_seconds(inside, idle, route.parts, network) - ends


def first_token_s(trip: Trip, route: Route, network: Network) -> float:
    """From the gateway's question to its first token, waiting for others included."""
    work = Work(prompt=TYPICAL.prompt, tokens=1)
    whole = route_seconds(replace(trip, work=work), route.stages, route.parts, network)
    return whole - network.back(route.stages[-1].node, route.stages[0].node, work)


def sentence(verdict: Verdict) -> str:
    """`weakest layer held by 2; about 14 tokens/s for one, at most 90 for all together`."""
    if not verdict.ready:
        return verdict.why_not
    one, all_ = readable(verdict.one_tokens_per_s), readable(verdict.all_tokens_per_s)
    speed = f"about {one} tokens/s for one, at most {all_} for all together"
    return f"weakest layer held by {verdict.holders}; {speed}"


def if_lost(needed: Needed, name: str) -> str:
    """`if amber-fox leaves, layers 8–15 are gone`."""
    one_layer = len(needed.layers) == 1 and len(needed.layers[0]) == 1
    return f"if {name} leaves, {named(needed.layers)} {'is' if one_layer else 'are'} gone"


def readable(rate: float) -> str:
    """Two digits: nobody knows it better beforehand."""
    if rate < 10:
        return f"{rate:.1f}"
    digits = len(f"{rate:.0f}")
    return str(round(rate, 2 - digits)).removesuffix(".0")
