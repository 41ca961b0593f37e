"""The sessions of a whole-model stage behind which another engine computes: messages in,
instructions out. No socket, no clock.

Such a stage is a ring of its own: it is told the prompt, and tells the gateway the tokens. What it
gives out are places (`slots`), as many as the engine takes at once; whoever finds none queues, as
it would for pages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..engine.request import Sampled, Sampling
from ..engine.served import Job
from ..errors import BadMessage
from ..units import NodeId, SessionId
from .messages import Lost, Open, Opened, Refused, TokenEntry, Tokens, one_line

MAX_WAITING = 256
MAX_PATIENCE_S = 120.0


@dataclass(frozen=True, slots=True)
class Say:
    node: NodeId
    message: Opened | Refused | Lost | Tokens


@dataclass(frozen=True, slots=True)
class Start:
    """Let the engine begin; tell `tokens` what comes, and `lost` when it fails."""

    session: SessionId
    job: Job


@dataclass(frozen=True, slots=True)
class Halt:
    """Nobody waits for this session any more: free the engine."""

    session: SessionId


FrontedInstruction = Say | Start | Halt


@dataclass(slots=True)
class Slots:
    """The engine's places, in the terms in which stages announce their room."""

    slots: int
    context_length: int
    used: int = 0

    @property
    def total_tokens(self) -> int:
        return self.slots * self.context_length

    @property
    def free_tokens(self) -> int:
        return max(0, self.slots - self.used) * self.context_length

    @property
    def used_fraction(self) -> float:
        return min(1.0, self.used / self.slots)


@dataclass(slots=True)
class _Fronted:
    open: Open
    gateway: NodeId
    job: Job
    deadline: float
    running: bool = False
    told: int = 0  # tokens that the gateway has been sent, those of earlier routes included


@dataclass
class FrontedSessions:
    """`refuses` says why the engine cannot honour some settings, or ""."""

    me: NodeId
    vocab_size: int
    pool: Slots
    refuses: Callable[[Sampling], str]
    gateway_share: float = 1.0  # of the slots, for one node other than ourselves
    _sessions: dict[SessionId, _Fronted] = field(default_factory=dict)

    def __contains__(self, session: object) -> bool:
        return session in self._sessions

    def __len__(self) -> int:
        return len(self._sessions)

    def ids(self) -> list[SessionId]:
        return list(self._sessions)

    @property
    def waiting(self) -> int:
        return sum(not each.running for each in self._sessions.values())

    # ---- opening

    def open(
        self, message: Open, ids: Sequence[int], gateway: NodeId, now: float
    ) -> list[FrontedInstruction]:
        """Raises BadMessage where no honest gateway could have sent this."""
        known = self._sessions.get(message.session)
        if known is not None and known.gateway == gateway:
            raise BadMessage(f"session {message.session} is already open")
        if known is not None:
            return [_refuse(message, gateway, "gone", "the session's id is taken")]
        job = self._job(message, ids)
        if never := self._impossible(message, job):
            return [_refuse(message, gateway, "never", never)]
        if unable := self.refuses(job.sampling):
            return [_refuse(message, gateway, "invalid", unable)]
        if self.waiting >= MAX_WAITING:
            return [_refuse(message, gateway, "busy", "too many wait here already")]
        patience = min(message.patience_s, MAX_PATIENCE_S)
        self._sessions[message.session] = _Fronted(
            message, gateway, job, now + patience, told=message.output_tokens
        )
        return self.admit(now)

    @staticmethod
    def _job(message: Open, ids: Sequence[int]) -> Job:
        if len(ids) != message.known_tokens:
            raise BadMessage(f"a stage needs {message.known_tokens} token ids, got {len(ids)}")
        if message.sampling is None:
            raise BadMessage("the last stage needs the sampling settings")
        prompt_tokens = len(ids) - message.output_tokens
        return Job(ids[:prompt_tokens], ids[prompt_tokens:], message.sampling)

    def _impossible(self, message: Open, job: Job) -> str:
        """Why this session can never be here, or ""."""
        longest = self.pool.context_length
        if message.reserve_tokens > longest:
            return f"{message.reserve_tokens} tokens wanted, a session here has {longest} at most"
        if max(job.ids) >= self.vocab_size:
            return f"token id {max(job.ids)} is outside the vocabulary of {self.vocab_size}"
        return "" if job.room > 0 else "no token is left to be made"

    def admit(self, now: float) -> list[FrontedInstruction]:
        """Give slots to the sessions that wait, first come first served. Call it again at
        `next_deadline`.
        """
        out: list[FrontedInstruction] = []
        for session, this in [*self._sessions.items()]:
            if this.running:
                continue
            if self.pool.used < self.pool.slots and not self._has_its_share(this.gateway):
                this.running = True
                self.pool.used += 1
                out += [Say(this.gateway, Opened(session)), Start(session, this.job)]
            elif now >= this.deadline:
                del self._sessions[session]
                out.append(_refuse(this.open, this.gateway, "busy", "the engine has no free slot"))
        return out

    def _has_its_share(self, gateway: NodeId) -> bool:
        if gateway == self.me:
            return False
        held = sum(each.running and each.gateway == gateway for each in self._sessions.values())
        return held >= max(1.0, self.pool.slots * self.gateway_share)

    def next_deadline(self) -> float | None:
        waiting = (each.deadline for each in self._sessions.values() if not each.running)
        return min(waiting, default=None)

    # ---- running

    def tokens(
        self, session: SessionId, sampled: Sequence[Sampled], now: float
    ) -> list[FrontedInstruction]:
        """The engine made these."""
        this = self._sessions.get(session)
        if this is None or not sampled:
            return []
        entries = tuple(
            TokenEntry(session, this.told + at, token) for at, token in enumerate(sampled)
        )
        this.told += len(sampled)
        out: list[FrontedInstruction] = [Say(this.gateway, Tokens(entries))]
        return out + self._end(session, now) if sampled[-1].finish else out

    def fail(self, session: SessionId, why: str, now: float) -> list[FrontedInstruction]:
        """We cannot go on: tell the gateway, which will look for another route."""
        this = self._sessions.get(session)
        if this is None:
            return []
        told = Say(this.gateway, Lost(session, self.me, one_line(why)))
        return [told, *self._end(session, now)]

    # ---- ending

    def close(self, session: SessionId, sender: NodeId, now: float) -> list[FrontedInstruction]:
        this = self._sessions.get(session)
        return self._end(session, now) if this is not None and this.gateway == sender else []

    def node_lost(self, node: NodeId, now: float) -> list[FrontedInstruction]:
        """A link went down: the sessions of that gateway end."""
        theirs = [key for key, each in self._sessions.items() if each.gateway == node]
        return [instruction for key in theirs for instruction in self._end(key, now)]

    def _end(self, session: SessionId, now: float) -> list[FrontedInstruction]:
        this = self._sessions.pop(session, None)
        if this is None or not this.running:
            return []
        self.pool.used -= 1
        return [Halt(session), *self.admit(now)]


def _refuse(
    message: Open, gateway: NodeId, reason: Literal["busy", "never", "gone", "invalid"], why: str
) -> Say:
    return Say(gateway, Refused(message.session, reason, one_line(why)))
