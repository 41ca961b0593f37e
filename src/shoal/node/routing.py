"""Which of the possible routes a new session takes.

The expected time decides (`placement/routes.py`), with what this gateway knows better than the
announcements: how busy stages are by now (`loads.py`) and who has the pages of the prompt
(`affinity.py`). Under the setting `throughput` sessions are shared out over routes in proportion to
what these can carry (`placement/flow.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Literal

from ..errors import NoRoute
from ..placement import Held, Network, Route, Trip, Work, cheapest_route, route_seconds
from ..placement.expect import prefill_s
from ..placement.flow import FlowSearch, Rotation
from ..placement.routes import crowded
from ..placement.simplex import Path
from ..units import ModelId, NodeId, Seconds, Slice
from .affinity import Affinity, Known

Routing = Literal["auto", "latency", "throughput"]

TYPICAL_TOKENS = 256  # of an answer: how long it will be nobody knows
NETWORK_S = 30.0  # how long distances are taken for true
FLOW_S = 10.0  # new stages get no share sooner, those that are gone lose theirs at once
ROUNDS = 16  # of the search for the best shares, at each look
MAX_MODELS = 16  # with shares of their own

Latency = Callable[[NodeId, NodeId], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingConfig:
    """`auto` counts the time by which a new session slows those that run: with load it spreads as
    the capacities do. `latency` counts its own time alone.
    """

    mode: Routing = "auto"
    typical_tokens: int = TYPICAL_TOKENS
    secret: bytes = b""  # names pages of prompts

    def work(self, prompt: int, need_tokens: int) -> Work:
        """What a session is expected to ask of each layer."""
        tokens = max(min(need_tokens - prompt, self.typical_tokens), 1)
        return Work(prompt, tokens, others=0.0 if self.mode == "latency" else 1.0)


@dataclass(frozen=True, slots=True)
class Session:
    """One that wants a route: what it needs, and the pages that its prompt consists of."""

    model: ModelId
    trip: Trip
    names: Sequence[bytes] = ()
    suspects: frozenset[NodeId] = frozenset()  # that are taken only if there is no other way


class Chooser:
    """`latency` says how far nodes are from each other, `clock` gives seconds; without `chance` the
    best route is always taken.
    """

    def __init__(
        self,
        latency: Latency,
        clock: Callable[[], float],
        chance: Random | None = None,
        config: RoutingConfig | None = None,
    ) -> None:
        self.config = config or RoutingConfig()
        self._latency, self.clock, self._chance = latency, clock, chance
        self.affinity = Affinity(self.config.secret, clock)
        self._network, self._asked_at = Network(latency), clock()
        self._shares: dict[ModelId, Shares] = {}

    def choose(self, session: Session, held: Sequence[Held]) -> Route:
        """Raises NoRoute."""
        if not session.suspects:
            return self._chosen(session, held)
        trip = replace(session.trip, avoid=session.trip.avoid | session.suspects)
        try:
            return self._chosen(replace(session, trip=trip), held)
        except NoRoute:
            return self._chosen(session, held)

    def possible(self, session: Session, held: Sequence[Held]) -> bool:
        """Whether there is a way at all; nobody's turn is taken."""
        try:
            cheapest_route(session.trip, held, self.network())
        except NoRoute:
            return False
        return True

    def remember(self, session: Session, route: Route) -> None:
        """The session goes that way: its prompt's pages will be there."""
        self.affinity.remember(session.names, Known(route.compute, route.hops))

    def _chosen(self, session: Session, held: Sequence[Held]) -> Route:
        found = [self._shared_out(session, held) or self._quickest(session, held)]
        if not session.trip.keep:
            found += self._known(session, held)
        known = self.affinity.find(session.names)
        return min(found, key=lambda route: self._spared(session, route, known))

    def _spared(
        self, session: Session, route: Route, known: dict[Known, int]
    ) -> tuple[bool, float]:
        """The expected time of the route without what its stages need not compute again."""
        prompt, tokens = session.trip.work.prompt, known.get(Known(route.compute, route.hops), 0)
        parts = zip(route.stages, route.parts, strict=True)
        spared = sum(prefill_s(stage, part, tokens, prompt) for stage, part in parts)
        return crowded(route, session.trip.need_tokens) > 0, route.seconds - spared

    def _quickest(self, session: Session, held: Sequence[Held]) -> Route:
        return cheapest_route(session.trip, held, self.network(), self._chance)

    def _known(self, session: Session, held: Sequence[Held]) -> list[Route]:
        """Routes that have pages of this prompt and can be taken."""
        there = _who_may(session.trip, held)
        known = self.affinity.find(session.names)
        routes = (self._route(session.trip, one.compute, one.hops, there) for one in known)
        return [route for route in routes if route is not None]

    def _route(
        self,
        trip: Trip,
        compute: str,
        hops: Sequence[tuple[NodeId, Slice]],
        there: Mapping[NodeId, Held],
    ) -> Route | None:
        """That very route, if all of its stages are still there and may be asked."""
        stages = tuple(there[node] for node, _ in hops if node in there)
        parts = tuple(part for _, part in hops)
        right = all(stage.compute == compute for stage in stages)
        if not right or len(stages) < len(hops) or not all(map(_runs, stages, parts)):
            return None
        seconds = route_seconds(trip, stages, parts, self.network())
        return Route(stages, parts, compute, Seconds(seconds))

    def network(self) -> Network:
        """Distances change slowly, and asking for them takes time."""
        if self.clock() - self._asked_at > NETWORK_S:
            self._network, self._asked_at = Network(self._latency), self.clock()
        return self._network

    # ---- throughput

    def _shared_out(self, session: Session, held: Sequence[Held]) -> Route | None:
        """The next route in turn, if it has room and nobody waits; None leaves it to the times."""
        if self.config.mode != "throughput" or session.trip.keep:
            return None
        shares, there = self._shares_of(session, held), _who_may(session.trip, held)
        found: dict[Path, Route] = {}

        def is_open(path: Path) -> bool:
            route = self._route(session.trip, path.compute, path.parts, there)
            if route is not None:
                found[path] = route
            return route is not None and not _full(route, session.trip.need_tokens)

        path = shares.rotation.next(is_open)
        return found[path] if path is not None else None

    def _shares_of(self, session: Session, held: Sequence[Held]) -> Shares:
        """Made anew from time to time, in strides: no session waits for the last percent."""
        shares = self._shares.get(session.model)
        stale = shares is None or self.clock() - shares.since > FLOW_S
        stages = frozenset((one.node, one.layers) for one in held if one.state == "serving")
        if shares is None or (stale and shares.stages != stages) or shares.stages - stages:
            work = replace(session.trip.work, others=0.0)
            search = FlowSearch(session.trip.layers, held, work, self.network())
            shares = Shares(stages, search, self.clock(), self._chance or Random(0))
            if len(self._shares) >= MAX_MODELS:
                self._shares.clear()
            self._shares[session.model] = shares
        shares.improve()
        return shares


class Shares:
    """The routes of one model and their parts of the traffic, better at each look."""

    def __init__(
        self,
        stages: frozenset[tuple[NodeId, Slice]],
        search: FlowSearch,
        since: float,
        chance: Random,
    ) -> None:
        self.stages, self.since = stages, since
        self._search, self._chance = search, chance
        self.rotation = Rotation((), chance)

    def improve(self) -> None:
        if not self._search.done:
            self._search.advance(ROUNDS)
            self.rotation = self.rotation.with_paths(self._search.flow().paths)


def _who_may(trip: Trip, held: Sequence[Held]) -> dict[NodeId, Held]:
    """Stages that a new session of this kind may be sent to."""
    return {
        stage.node: stage
        for stage in held
        if stage.state == "serving"
        and stage.node not in trip.avoid
        and trip.compute in (None, stage.compute)
    }


def _runs(stage: Held, part: Slice) -> bool:
    if stage.whole:
        return part == stage.layers
    return stage.layers.start <= part.start and part.stop <= stage.layers.stop


def _full(route: Route, need_tokens: int) -> bool:
    return crowded(route, need_tokens) > 0 or any(stage.queue for stage in route.stages)
