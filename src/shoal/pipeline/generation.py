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
is chained to the route: what a bad stage put into others' pages is never met on a route without it.

A session may be sent away by an older one that needs its pages. It is then opened again, patiently,
with the token ids so far, and the stream merely pauses.

When a stage is lost, another route without it is opened with the token ids so far, and the stream
goes on: a token is delivered once, by its index, and only from the live session.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from msgspec.structs import replace

from ..engine.prefix import PAGE_TOKENS, page_digests
from ..engine.request import Sampled, Sampling
from ..errors import InvalidRequest, Overloaded, PromptTooLong, ShoalError, StageLost
from ..units import ModelId, NodeId, SessionId, Slice
from .messages import Close, Lost, Open, Opened, Preempted, Refused, TokenEntry, one_line

ANY_TOKEN = 1 << 32  # the bound of token ids where the gateway does not know the vocabulary


@dataclass(frozen=True, slots=True)
class Stop:
    """One station of a route."""

    node: NodeId
    layers: Slice


@dataclass(frozen=True, slots=True)
class Plan:
    """Where a model is computed: the stations of a route in the order of their layers."""

    model: ModelId
    compute: str
    stops: tuple[Stop, ...]
    vocab_size: int = ANY_TOKEN  # token ids are below it


@dataclass(frozen=True, slots=True)
class Request:
    """What a client wants: already tokenised, already checked against the model's context."""

    model_name: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Tell:
    """Send `message` to `node`, `digests` and `ids` in its body."""

    node: NodeId
    message: Open | Close
    ids: tuple[int, ...] = ()
    digests: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class FindRoute:
    """Ask for a route around `avoid`; call `route` with it, or `no_route` when there is none."""

    avoid: frozenset[NodeId]


@dataclass(frozen=True, slots=True)
class Deliver:
    sampled: Sampled


@dataclass(frozen=True, slots=True)
class Finish:
    """The generation is over: `error` is None after a whole answer."""

    reason: str
    error: ShoalError | None = None


Instruction = Tell | FindRoute | Deliver | Finish


@dataclass(kw_only=True, frozen=True, slots=True)
class GenerationConfig:
    max_attempts: int = 6
    queue_patience_s: float = 60.0  # how long a session may queue for pages at one stage
    reunion_s: float = 1.5  # how long to look for a route again after one broke
    answer_timeout_s: float = 10.0  # a stage that does not answer an Open is taken for lost
    page_tokens: int = PAGE_TOKENS  # pages that stages may share are of this size
    max_preemptions: int = 16  # between two tokens: then it is the stage's doing
    stall_timeout_s: float = (
        120.0  # the same for a session without a token: long prompts on slow nodes need time
    )


@dataclass
class Generation:
    """State of one request. `state`: routing -> opening -> running -> over."""

    request: Request
    new_session: Callable[[], SessionId]
    config: GenerationConfig = field(default_factory=GenerationConfig)
    born: int = 0  # microseconds since 1970: the older goes first where pages are short
    secret: bytes = b""  # known to our gateway alone: else digests would give away what was said
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
    _digests: list[bytes] = field(default_factory=list)  # of the pages known when it was opened
    _prefix: int = 0  # tokens that all stages asked so far have pages for
    _refusal: ShoalError | None = None  # why a stage would not have us, if no other will

    @property
    def progress(self) -> tuple[int, int, int]:
        """Grows with every answer that got us on."""
        return self.attempt, len(self._open), len(self.output)

    @property
    def needed_tokens(self) -> int:
        """The longest this session can become."""
        return len(self.request.prompt_ids) + self.request.sampling.max_tokens

    def begin(self) -> list[Instruction]:
        return [FindRoute(self.avoid)]

    # ---- opening a route

    def route(self, plan: Plan) -> list[Instruction]:
        """Try this route. The Opens go out in one stride, or one by one when the last try found
        pages short.
        """
        if self.state == "over":
            return []
        self.attempt += 1
        self.plan, self.session, self.state = plan, self.new_session(), "opening"
        self._open, self._asked = [], {}
        self._to_open = [*plan.stops[1:], plan.stops[0]]
        self._digests = self._chain(self._known()[:-1], [])
        self._prefix = len(self._digests) * self.config.page_tokens
        if self._preemptions > 1:  # perhaps what was shared could not be replaced: share nothing
            self._prefix = 0
        return self._ask_next()

    def _known(self) -> tuple[int, ...]:
        return (*self.request.prompt_ids, *self.output)

    def _chain(self, ids: Sequence[int], before: Sequence[bytes]) -> list[bytes]:
        plan = self._plan()
        route = " ".join(f"{stop.node} {stop.layers}" for stop in plan.stops)
        root = hashlib.blake2b(f"{plan.compute} {route}".encode(), key=self.secret).digest()
        return page_digests(ids, self.config.page_tokens, root, before)

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
        return self._given_up(lost)

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
        first, last = at == 0, at == len(plan.stops) - 1
        ids: tuple[int, ...] = ()
        if first or (last and sampling.repetition_penalty != 1.0):
            ids = self._known()
        elif last:
            ids = tuple(self.output)
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
            patience_s=self.config.queue_patience_s if self.patient else 0.0,
            born=self.born,
            page_tokens=self.config.page_tokens,
            digests=len(self._digests),
            prefix_tokens=self._prefix,
        )
        return Tell(stop.node, message, ids, tuple(self._digests))

    def opened(self, message: Opened, sender: NodeId) -> list[Instruction]:
        stop = self._asked.pop(sender, None) if message.session == self.session else None
        if self.state != "opening" or stop is None:
            return []
        self._open.append(stop)
        self._prefix = min(self._prefix, message.prefix_tokens)
        if self._asked:
            return []
        if self._to_open:
            return self._ask_next()
        self._started()
        return []

    def _started(self) -> None:
        self._open += self._asked.values()
        self._asked = {}
        self.state = "running"

    def refused(self, message: Refused, sender: NodeId) -> list[Instruction]:
        if self.state != "opening" or message.session != self.session or sender not in self._asked:
            return []
        del self._asked[sender]
        why = one_line(message.message)
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
        if self.state == "opening" and not self._to_open and self._asked:
            self._started()  # the token overtook the first stage's Opened: another link
        if self.state != "running":
            return []
        if sender != self._plan().stops[-1].node or entry.index != len(self.output):
            return []
        if any(each.token >= self._plan().vocab_size for each in entry.tokens):
            return self._again(frozenset({sender}), "it sent a token that does not exist")
        self._preemptions = 0
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
        closing = self._abandon()
        self.state = "routing"
        return [*closing, FindRoute(self.avoid)]

    def stage_lost(self, message: Lost, sender: NodeId) -> list[Instruction]:
        """A stage reports that it cannot go on; `message.node` is whom it blames."""
        if message.session != self.session or sender not in self._nodes():
            return []
        blamed = message.node if message.node in self._nodes() else sender
        self.lost |= {blamed}
        return self._again(frozenset({blamed}), one_line(message.message))

    def node_lost(self, node: NodeId, why: str) -> list[Instruction]:
        """Our own link to a stage went down."""
        if self.state in ("routing", "over") or node not in self._nodes():
            return []
        self.lost |= {node}
        return self._again(frozenset({node}), why)

    def stalled(self) -> list[Instruction]:
        """Nothing came for too long: whoever owes an answer is taken for lost."""
        if self.state in ("routing", "over"):
            return []
        owing = frozenset(self._asked) or frozenset({self._plan().stops[-1].node})
        return self._again(owing, "no answer in time")

    def cancel(self) -> list[Instruction]:
        if self.state == "over":
            return []
        return [*self._abandon(), *self._over("cancelled", None)]

    # ---- shared

    def _again(self, avoid: frozenset[NodeId], why: str) -> list[Instruction]:
        names = ", ".join(sorted(avoid)) or "a stage"
        self._blame = f"{names}: {why}"
        closing = self._abandon()
        self.avoid |= avoid
        self.state = "routing"
        self._failures += 1
        if self._failures >= self.config.max_attempts:
            error = StageLost(
                f"gave up after {self._failures} routes; the last failure was {self._blame}",
                hint="look at `shoal peers` and `shoal status` on the nodes named",
            )
            return [*closing, *self._given_up(error)]
        return [*closing, FindRoute(self.avoid)]

    def _abandon(self) -> list[Instruction]:
        """Close the live session wherever it was opened or asked for. The newest token has not been
        computed by anybody.
        """
        if self.session is None:
            return []
        digests = tuple(self._chain(self._known()[:-1], self._digests)[len(self._digests) :])
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
