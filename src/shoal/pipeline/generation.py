"""One generation as its gateway sees it: answers in, instructions out. No socket, no clock, no
randomness of its own.

A route is tried as a session of its own, with a fresh id: `strides.py` opens one, `mending.py`
mends one that broke, `attempt.py` has what both go by. In either case the stream goes on: a token
is delivered once, by its index, and only from the live session.

A session may be sent away by an older one that needs its pages. It is then opened again, patiently,
with the token ids so far, and the stream merely pauses.
"""

from __future__ import annotations

from dataclasses import dataclass

from msgspec.structs import replace

from ..engine.request import Sampled
from ..errors import InvalidRequest, Overloaded, PromptTooLong
from ..units import NodeId
from .mending import Mending
from .messages import Leaving, Lost, Opened, Preempted, Refused, TokenEntry, one_line
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


@dataclass
class Generation(Mending):
    """The whole life of one request: what its gateway hears, and what it makes of it."""

    # ---- a route

    def begin(self) -> list[Instruction]:
        return [self._find()]

    def look_again(self, back: frozenset[NodeId]) -> list[Instruction]:
        """Those who are `back` have another chance. Nobody misses them while nothing is found."""
        return [self._find(self.avoid - back)]

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
        if self.state == "routing" and sender in self.avoid:  # but not of whom it broke on
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

    # ---- a route that does not last

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
