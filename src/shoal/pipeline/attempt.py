"""What a gateway knows of one generation, whatever becomes of it: what was asked for, what came,
the route that is being tried, and how that is given up for another one or for good.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..engine.prefix import page_digests
from ..errors import ShoalError, StageLost
from ..units import NodeId, SessionId
from .messages import Close
from .plans import FindRoute, Finish, GenerationConfig, Instruction, Plan, Request, Stop, Tell, Wish
from .recovery import Cache

Kind = Literal["new", "queued", "recomputed", "replayed", "handed over"]  # of an attempt


@dataclass
class Attempt:
    """State of one request. `state`: routing -> opening -> running -> over."""

    request: Request
    new_session: Callable[[], SessionId]
    config: GenerationConfig = field(default_factory=GenerationConfig)
    born: int = 0  # microseconds since 1970: the older goes first where pages are short
    secret: bytes = b""  # known to our gateway alone: else digests would give away what was said
    era: Callable[[NodeId], int] = lambda node: 0  # another one each time our link to it is lost
    state: Literal["routing", "opening", "running", "over"] = "routing"
    output: list[int] = field(default_factory=list)
    attempt: int = 0
    avoid: frozenset[NodeId] = frozenset()
    lost: frozenset[NodeId] = frozenset()  # of these, those that went away and may come back
    plan: Plan | None = None
    session: SessionId | None = None
    patient: bool = (
        False  # pages were short: the stages are opened one by one and the session queues there
    )
    _to_open: list[Stop] = field(default_factory=list)  # not asked yet
    _asked: dict[NodeId, Stop] = field(default_factory=dict)  # asked, not answered
    _open: list[Stop] = field(default_factory=list)
    _blame: str = ""
    _failures: int = 0
    _preemptions: int = 0  # since the last token
    _waited: bool = False  # it has been preempted: it queues again rather than give up
    _root: bytes = b""  # of all digests on this route
    _digests: list[bytes] = field(default_factory=list)  # of the pages known when it was opened
    _prefix: int = 0  # tokens that all stages asked so far have pages for
    _refusal: ShoalError | None = None  # why a stage would not have us, if no other will
    kind: Kind = "new"  # of the attempt in progress
    replayed: int = 0  # tokens that stages of the mended route were told to send again
    _next_kind: Kind = "new"
    _caches: dict[NodeId, Cache] | None = None  # of a route being mended: what its stages have
    _kept: frozenset[NodeId] = frozenset()  # of its stages, those that go on
    _stalls: int = 0  # since anything got on
    _had: int = 0  # tokens that all stages together had when they were last asked

    @property
    def progress(self) -> tuple[int, int, int]:
        """Grows with every answer that got us on."""
        return self.attempt, len(self._open), len(self.output)

    @property
    def mending(self) -> bool:
        """Stages are asked what they have."""
        return self.state == "opening" and self._caches is not None

    @property
    def needed_tokens(self) -> int:
        """The longest this session can become."""
        return len(self.request.prompt_ids) + self.request.sampling.max_tokens

    def _known(self) -> tuple[int, ...]:
        return (*self.request.prompt_ids, *self.output)

    def _nodes(self) -> frozenset[NodeId]:
        return frozenset(stop.node for stop in self.plan.stops) if self.plan else frozenset()

    def _plan(self) -> Plan:
        assert self.plan is not None  # noqa: S101 - set by route(), which every state but "routing" has passed
        return self.plan

    def _session(self) -> SessionId:
        assert self.session is not None  # noqa: S101 - set with the plan
        return self.session

    # ---- looking for a route

    def _find(self, avoid: frozenset[NodeId] | None = None, needed: bool = True) -> FindRoute:
        """First around what is kept, then any."""
        wish = Wish(
            self.request.model_name,
            self.needed_tokens,
            self.request.prompt_ids,
            self.avoid if avoid is None else avoid,
            compute=self.plan.compute if self.plan is not None and self.output else None,
        )
        staying = tuple(stop for stop in self._open if stop.node not in wish.avoid)
        if not staying:
            return FindRoute((wish,), needed)
        mended = Wish(
            wish.model_name, wish.need_tokens, wish.prompt_ids, wish.avoid, staying, wish.compute
        )
        return FindRoute((mended, wish), needed)

    def no_route(self, error: ShoalError) -> list[Instruction]:
        """There is none (any more)."""
        if self.state == "over":
            return []
        if not self.output and self.attempt == 0:
            return self._over(error.code, error)
        lost = StageLost(
            f"the answer broke off after {len(self.output)} tokens: "
            f"{self._blame}, and {error.message}",
            hint="ask again once the layers are back; `shoal map MODEL` shows who holds them",
        )
        return [*self._abandon(), *self._given_up(lost)]

    def _given_up(self, error: ShoalError) -> list[Instruction]:
        """Before the first token a refusal says more than that nobody is left to ask."""
        told = self._refusal if self._refusal is not None and not self.output else error
        return self._over(told.code, told)

    # ---- giving a route up

    def _again(self, avoid: frozenset[NodeId], why: str) -> list[Instruction]:
        names = ", ".join(sorted(avoid)) or "a stage"
        self._blame = f"{names}: {why}"
        closing = self._abandon(named=not avoid)
        self.avoid |= avoid
        self.state = "routing"
        self._next_kind = "recomputed" if avoid else "queued"
        self._failures += 1
        if self._failures >= self.config.max_attempts:
            error = StageLost(
                f"gave up after {self._failures} routes; the last failure was {self._blame}",
                hint="look at `shoal peers` and `shoal status` on the nodes named",
            )
            return [*closing, *self._given_up(error)]
        return [*closing, self._find()]

    def _abandon(self, named: bool = True) -> list[Instruction]:
        """Close the live session wherever it was opened or asked for. Its pages are `named` where
        nobody on the route has done wrong.
        """
        if self.session is None:
            return []
        digests: tuple[bytes, ...] = ()
        if named and not self._kept:  # else this route would name what was computed on another
            digests = tuple(self._chain(self._digests)[len(self._digests) :])
        session, self.session = self.session, None
        stops: Sequence[Stop] = [*self._open, *self._asked.values()]
        self._open, self._asked, self._to_open = [], {}, []
        return [Tell(stop.node, Close(session), digests=digests) for stop in stops]

    def _close(self, stops: Iterable[Stop]) -> list[Instruction]:
        return [Tell(stop.node, Close(self._session())) for stop in stops]

    def _over(self, reason: str, error: ShoalError | None) -> list[Instruction]:
        self.state = "over"
        return [Finish(reason, error)]

    # ---- naming pages

    def _root_of(self, plan: Plan) -> bytes:
        route = " ".join(f"{stop.node} {self.era(stop.node)} {stop.layers}" for stop in plan.stops)
        return hashlib.blake2b(f"{plan.compute} {route}".encode(), key=self.secret).digest()

    def _chain(self, before: Sequence[bytes]) -> list[bytes]:
        """Of all that is known but the newest token, which nobody has computed."""
        return page_digests(self._known()[:-1], self.config.page_tokens, self._root, before)
