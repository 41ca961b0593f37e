"""One generation as its gateway sees it: answers in, instructions out. No socket, no clock, no
randomness of its own.

A route is tried as a session of its own, with a fresh id. Opening it takes two strides, so that the
first stage never computes for a stage that is not ready: first every stage but the first is opened,
then the first, whose Open carries the prompt and so starts the work. When pages are short
somewhere, the session queues: the stages are then opened one after the other in the order of their
layers (the first one last), an order that all gateways share, so that two sessions can never wait
for each other in a circle.

Stages keep pages of earlier sessions. The Opens name the prompt's pages by digests, each stage says
how many of them it has, and the first one, told the least of these numbers, begins there. A digest
is chained to the route: what a bad stage put into others' pages is never met on a route without it,
nor on one with it once our link to it was lost (its `era` is over), as when its process began anew.

A session may be sent away by an older one that needs its pages. It is then opened again, patiently,
with the token ids so far, and the stream merely pauses.

When a stage is lost, the others keep the session for a moment, and only what is missing is planned
anew. All stages of the mended route are told at once, the old ones to drop what waits and to say
what they have (Resume), the new ones to come in (Open, held); then each one what to send again
(Go), as `recovery.py` decides. Where nobody goes on, or somebody refuses, another route is opened
with the token ids so far. In either case the stream goes on: a token is delivered once, by its
index, and only from the live session.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from msgspec.structs import replace

from ..engine.prefix import page_digests
from ..engine.request import Sampled
from ..errors import InvalidRequest, Overloaded, PromptTooLong, ShoalError, StageLost
from ..units import NodeId, SessionId
from .messages import (
    Close,
    Go,
    Leaving,
    Lost,
    Open,
    Opened,
    Preempted,
    Refused,
    Resume,
    TokenEntry,
    one_line,
)
from .plans import (
    ANY_TOKEN,
    Deliver,
    FindRoute,
    Finish,
    GenerationConfig,
    Instruction,
    Plan,
    Request,
    Stop,
    Tell,
    Wish,
)
from .recovery import Cache, restarts

__all__ = [
    "ANY_TOKEN",
    "Deliver",
    "FindRoute",
    "Finish",
    "Generation",
    "GenerationConfig",
    "Instruction",
    "Plan",
    "Request",
    "Stop",
    "Tell",
    "Wish",
]

Kind = Literal["new", "queued", "recomputed", "replayed", "handed over"]  # of an attempt


@dataclass
class Generation:
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

    def begin(self) -> list[Instruction]:
        return [self._find()]

    # ---- opening a route

    def look_again(self, back: frozenset[NodeId]) -> list[Instruction]:
        """Those who are `back` have another chance. Nobody misses them while nothing is found."""
        return [self._find(self.avoid - back)]

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

    def route(self, plan: Plan) -> list[Instruction]:
        """Try this route, around those of its stages that have the session already, if any."""
        if self.state == "over":
            return []
        kept = self._staying(plan)
        if self.state == "running":  # who leaves is not asked again, unless nobody else is there
            left = frozenset(stop.node for stop in self._open if stop not in plan.stops)
            self.avoid, self.lost = self.avoid | left, self.lost | left
        closing = self._close(stop for stop in self._open if stop not in kept)
        self._open = [stop for stop in self._open if stop in kept]
        before, self.session = self.session, self.new_session()
        self.attempt += 1
        self.plan, self.state, self._prefix, self._digests = plan, "opening", 0, []
        self.kind, self.replayed = self._next_kind, 0
        if kept and before is not None:
            return [*closing, *self._mend(before)]
        return [*closing, *self._open_anew()]

    def _staying(self, plan: Plan) -> list[Stop]:
        old = self.plan
        if old is None or (old.model, old.compute) != (plan.model, plan.compute):
            return []
        return [stop for stop in self._open if stop in plan.stops]

    def _open_anew(self) -> list[Instruction]:
        """The Opens go out in one stride, or one by one when the last try found pages short."""
        plan = self._plan()
        if self.kind in ("replayed", "handed over"):
            self.kind = "recomputed"
        self._open, self._asked, self._caches, self._kept = [], {}, None, frozenset()
        self._to_open = [*plan.stops[1:], plan.stops[0]]
        self._root = self._root_of(plan)
        self._digests = self._chain([])
        self._prefix = len(self._digests) * self.config.page_tokens
        if self._preemptions > 1:  # perhaps what was shared could not be replaced: share nothing
            self._prefix = 0
        return self._ask_next()

    def _mend(self, before: SessionId) -> list[Instruction]:
        """Everybody is asked at once; nothing begins before all have answered."""
        if self.kind in ("new", "recomputed"):
            self.kind = "replayed"
        self._kept = frozenset(stop.node for stop in self._open)
        self._open, self._to_open, self._caches = [], [], {}
        self._asked = {stop.node: stop for stop in self._plan().stops}
        return [
            self._tell_resume(stop, before) if node in self._kept else self._tell_open(stop)
            for node, stop in self._asked.items()
        ]

    def _tell_resume(self, stop: Stop, before: SessionId) -> Tell:
        stops = self._plan().stops
        at = stops.index(stop)
        message = Resume(
            session=before,
            renamed=self._session(),
            known_tokens=len(self._known()),
            output_tokens=len(self.output),
            previous=stops[at - 1].node,
            next=stops[(at + 1) % len(stops)].node,
        )
        return Tell(stop.node, message, self._ids_for(at))

    def _ids_for(self, at: int) -> tuple[int, ...]:
        """All to the first stage; to the last one what its sampler has to know."""
        last = at == len(self._plan().stops) - 1
        if at == 0 or (last and self.request.sampling.repetition_penalty != 1.0):
            return self._known()
        return tuple(self.output) if last else ()

    def _go(self) -> list[Instruction]:
        """All stages of the mended route are there: the head, which begins, is told last."""
        stops, caches = self._plan().stops, self._caches or {}
        told = restarts([caches[stop.node] for stop in stops])
        self.replayed = sum(each.replayed for each in told)
        total = sum(caches[stop.node].tokens for stop in stops)
        self._stalls = self._stalls if total <= self._had else 0  # it was merely slow
        self._had = total
        self._started()
        goes: list[Instruction] = [
            Tell(stop.node, Go(self._session(), each.send_from, each.redo))
            for stop, each in zip(stops, told, strict=True)
        ]
        return goes[::-1]

    def _known(self) -> tuple[int, ...]:
        return (*self.request.prompt_ids, *self.output)

    def _root_of(self, plan: Plan) -> bytes:
        route = " ".join(f"{stop.node} {self.era(stop.node)} {stop.layers}" for stop in plan.stops)
        return hashlib.blake2b(f"{plan.compute} {route}".encode(), key=self.secret).digest()

    def _chain(self, before: Sequence[bytes]) -> list[bytes]:
        """Of all that is known but the newest token, which nobody has computed."""
        return page_digests(self._known()[:-1], self.config.page_tokens, self._root, before)

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

    def _ask_next(self) -> list[Instruction]:
        last_stride = len(self._to_open) == 1
        now = self._to_open[:1] if self.patient or last_stride else self._to_open[:-1]
        self._to_open = self._to_open[len(now) :]
        self._asked = {stop.node: stop for stop in now}
        return [self._tell_open(stop) for stop in now]

    def _tell_open(self, stop: Stop) -> Tell:
        plan, sampling, prompt = self._plan(), self.request.sampling, self.request.prompt_ids
        at = plan.stops.index(stop)
        last = at == len(plan.stops) - 1
        message = Open(
            session=self._session(),
            model=plan.model,
            compute=plan.compute,
            layers=stop.layers,
            previous=plan.stops[at - 1].node,
            next=plan.stops[(at + 1) % len(plan.stops)].node,
            known_tokens=len(prompt) + len(self.output),
            reserve_tokens=self.needed_tokens,
            output_tokens=len(self.output),
            sampling=sampling if last else None,
            patience_s=self._queue_patience_s,
            born=self.born,
            page_tokens=self.config.page_tokens,
            digests=len(self._digests),
            prefix_tokens=self._prefix,
            hold=self._caches is not None,
        )
        return Tell(stop.node, message, self._ids_for(at), tuple(self._digests))

    def opened(self, message: Opened, sender: NodeId) -> list[Instruction]:
        stop = self._asked.pop(sender, None) if message.session == self.session else None
        if self.state != "opening" or stop is None:
            return []
        self._open.append(stop)
        if self._caches is not None:
            return self._answered(message, sender)
        self._prefix = min(self._prefix, message.prefix_tokens)
        if self._asked:
            return []
        if self._to_open:
            return self._ask_next()
        self._started()
        return []

    @property
    def _queue_patience_s(self) -> float:
        """Who keeps others waiting does not queue."""
        return self.config.queue_patience_s if self.patient and self._caches is None else 0.0

    def _answered(self, message: Opened, sender: NodeId) -> list[Instruction]:
        """A stage of a route being mended is there."""
        tokens = message.prefix_tokens
        if tokens >= len(self._known()) or (tokens and sender not in self._kept):
            return self._broken(frozenset({sender}), "it has what nobody gave it")
        assert self._caches is not None  # noqa: S101 - who calls has looked
        self._caches[sender] = Cache(tokens, min(message.kept_from, tokens))
        return [] if self._asked else self._go()

    def _started(self) -> None:
        self._open += self._asked.values()
        self._asked, self._caches = {}, None
        self.state = "running"

    def refused(self, message: Refused, sender: NodeId) -> list[Instruction]:
        if self.state != "opening" or message.session != self.session or sender not in self._asked:
            return []
        why = one_line(message.message)
        if self._caches is not None and message.reason in ("gone", "unreachable"):
            return self._broken(frozenset({sender}), why)
        del self._asked[sender]
        match message.reason:
            case "busy" if not self.patient and self._refusal is None:
                self.patient = True
                return self._again(frozenset(), why)
            case "never":
                self._refusal = PromptTooLong(
                    f"this prompt with max_tokens={self.request.sampling.max_tokens} "
                    f"cannot be held: {why}",
                    hint="ask for fewer max_tokens, or shorten the prompt",
                    param="max_tokens",
                )
            case "invalid":
                held = self.request.sampling.grammar is not None
                self._refusal = InvalidRequest(why, param="response_format" if held else None)
            case "busy" if self._waited:
                return self._again(frozenset(), why)
            case "busy":
                self.patient = False  # once is enough: the others are asked in passing
                self._refusal = Overloaded(
                    f"the mesh is full: {why}",
                    hint="ask again later, or add a node with `shoal up --join TICKET`",
                    retry_after_s=5.0,
                )
        return self._again(frozenset({sender}), why)

    # ---- running

    def token(self, entry: TokenEntry, sender: NodeId) -> list[Instruction]:
        if entry.session != self.session or self.session is None:
            return []
        if self.state == "opening" and not self._to_open and self._asked and not self._caches:
            self._started()  # the token overtook the first stage's Opened: another link
        if self.state not in ("running", "routing"):  # what a broken route had chosen still counts
            return []
        if sender != self._plan().stops[-1].node:
            return []
        if entry.index != len(self.output):  # or one that is amiss might be taken for the next
            return self._broken(frozenset({sender}), f"token {entry.index} came out of turn")
        if any(each.token >= self._plan().vocab_size for each in entry.tokens):
            return self._broken(frozenset({sender}), "it sent a token that does not exist")
        self._preemptions = self._stalls = 0
        self._failures = 0 if self.state == "running" else self._failures
        delivered: list[Instruction] = []
        for each in entry.tokens:
            self.output.append(each.token)
            sampled = self._ended(each)
            delivered.append(Deliver(sampled))
            if sampled.finish:
                return [*delivered, *self._abandon(), *self._over(sampled.finish, None)]
        return delivered

    def _ended(self, sampled: Sampled) -> Sampled:
        """The last stage says when it is over, but it does not get more than was asked for."""
        if sampled.finish or len(self.output) < self.request.sampling.max_tokens:
            return sampled
        return replace(sampled, finish="length")

    def preempted(self, message: Preempted, sender: NodeId) -> list[Instruction]:
        """A stage needed our pages for an older session: nobody is to blame, we queue again."""
        if message.session != self.session or sender not in self._nodes():
            return []
        self.patient = self._waited = True
        self._preemptions += 1
        if self._preemptions > self.config.max_preemptions:
            return self._again(frozenset({sender}), "it never lets us get on")
        waiting, closing = self.state == "routing", self._abandon()
        self.state, self._next_kind = "routing", "queued"
        return closing if waiting else [*closing, self._find()]

    def stage_lost(self, message: Lost, sender: NodeId) -> list[Instruction]:
        """A stage reports that it cannot go on; `message.node` is whom it blames."""
        if message.session != self.session or sender not in self._nodes():
            return []
        blamed = message.node if message.node in self._nodes() else sender
        self.lost |= {blamed}
        gone = frozenset({blamed} if message.kept else {blamed, sender})
        return self._broken(frozenset({blamed}), one_line(message.message), gone)

    def node_lost(self, node: NodeId, why: str) -> list[Instruction]:
        """Our own link to a stage went down."""
        if self.state == "over" or self.session is None or node not in self._nodes():
            return []
        if self.state == "routing" and node not in {stop.node for stop in self._open}:
            return []
        self.lost |= {node}
        return self._broken(frozenset({node}), why)

    def leaving(self, message: Leaving, sender: NodeId) -> list[Instruction]:
        """A stage wants to go, and serves us meanwhile: we move if there is a route without it.
        While there is no route it is not kept: perhaps it goes to hold what is missing.
        """
        if message.session != self.session or sender not in self._nodes():
            return []
        if self.state == "routing":
            left = [stop for stop in self._open if stop.node == sender]
            self._open = [stop for stop in self._open if stop.node != sender]
            return self._close(left)
        if self.state != "running":
            return []
        self._next_kind = "handed over"
        return [self._find(self.avoid | {sender}, needed=False)]

    def stalled(self) -> list[Instruction]:
        """Nothing came for too long: whoever owes an answer is taken for lost. When nobody does,
        all stages are asked once where they are, and who does not answer that is the one.
        """
        if self.state in ("routing", "over"):
            return []
        if self._asked:
            return self._broken(frozenset(self._asked), "no answer in time")
        self._stalls += 1
        if self.config.replay and self._stalls == 1 and len(self._plan().stops) > 1:
            self._next_kind = "replayed"
            return self.route(self._plan())
        return self._again(frozenset({self._plan().stops[-1].node}), "no answer in time")

    def cancel(self) -> list[Instruction]:
        if self.state == "over":
            return []
        return [*self._abandon(), *self._over("cancelled", None)]

    # ---- shared

    def _broken(
        self, avoid: frozenset[NodeId], why: str, gone: frozenset[NodeId] = frozenset()
    ) -> list[Instruction]:
        """Mend the route where some of its stages have been at work, and go on with these."""
        waiting = self.state == "routing"  # we look for a route now and then
        staying = [stop for stop in self._holders() if stop.node not in avoid | gone]
        if waiting and not staying:
            closing = self._abandon()
            self.avoid |= avoid
            return closing
        if not staying or not self.config.replay or self._failures + 1 >= self.config.max_attempts:
            return self._again(avoid, why)
        closing = self._close(
            stop for stop in (*self._open, *self._asked.values()) if stop not in staying
        )
        self._blame = f"{', '.join(sorted(avoid))}: {why}"
        self._open, self._asked, self._to_open = staying, {}, []
        self.avoid |= avoid
        if waiting:
            return closing
        self.state, self._next_kind, self._caches = "routing", "recomputed", None
        self._failures += 1
        return [*closing, self._find()]

    def _holders(self) -> list[Stop]:
        """The stages that have something to go on from, in order."""
        if self.state != "opening":
            return self._open
        if self._caches is None:
            return []
        open_now = self._open
        return [stop for stop in self._plan().stops if stop in open_now or stop.node in self._kept]

    def _close(self, stops: Iterable[Stop]) -> list[Instruction]:
        return [Tell(stop.node, Close(self._session())) for stop in stops]

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

    def _over(self, reason: str, error: ShoalError | None) -> list[Instruction]:
        self.state = "over"
        return [Finish(reason, error)]

    def _nodes(self) -> frozenset[NodeId]:
        return frozenset(stop.node for stop in self.plan.stops) if self.plan else frozenset()

    def _plan(self) -> Plan:
        assert self.plan is not None  # noqa: S101 - set by route(), which every state but "routing" has passed
        return self.plan

    def _session(self) -> SessionId:
        assert self.session is not None  # noqa: S101 - set with the plan
        return self.session
