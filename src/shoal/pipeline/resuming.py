"""A stage's sessions whose route broke: they keep what they have until told how to go on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from ..errors import BadMessage
from ..units import NodeId, SessionId
from .messages import Go, Leaving, Lost, Open, Refused, Resume, RowEntry, Step, one_line
from .session import Connect, Drop, Instruction, Replay, Send, Session
from .table import SessionTable


@dataclass
class ResumingSessions(SessionTable, ABC):
    """From the loss of a neighbour, or its gateway's Resume, until a session runs again."""

    def suspend(self, this: Session, node: NodeId, why: str, now: float) -> list[Instruction]:
        """A neighbour is gone: the gateway has a moment to say who takes its place."""
        if this.state != "settling":
            self._wait_for_word(this, "suspended", now)
        told = Send(this.gateway, Lost(this.open.session, node, one_line(why), kept=True))
        return [*self._rest(this), told]

    def leave(self) -> list[Instruction]:
        """Ask every gateway to go on without us. Nothing changes here until it does."""
        return [
            Send(this.gateway, Leaving(this.open.session))
            for this in self._sessions.values()
            if not this.closed and this.state in ("running", "replaying", "suspended")
        ]

    def _rest(self, this: Session) -> list[Instruction]:
        this.pending.clear()
        this.held.clear()
        self._pages.rest(this)
        return [Drop(this.open.session)]

    def resume(
        self, message: Resume, ids: Sequence[int], sender: NodeId, now: float
    ) -> list[Instruction]:
        """The session goes by another id from now on, and is answered for once no forward computes
        any row of it. Raises BadMessage where no honest gateway could have sent this.
        """
        this = self._sessions.get(message.session)
        if this is None or this.closed or this.gateway != sender:
            return [self._gone(message, sender, "the session is not here (any more)")]
        taken = message.renamed in self._sessions or message.renamed in self._former
        if this.state in ("connecting", "waiting") or taken:
            return [self._gone(message, sender, "the session cannot go on here"), *self._end(this)]
        mended = self._mended(this.open, message)
        self._opening.check(mended, ids)
        if never := self._opening.impossible(mended, ids):
            return [self._gone(message, sender, never), *self._end(this), *self.admit(now)]
        sampler = self._opening.sampler(mended, ids, sender)
        if isinstance(sampler, Send):
            return [sampler, *self._end(this), *self.admit(now)]
        out = self._rest(this)
        self._rename(this, mended)
        this.sampler, this.ids, this.drafting = sampler, ids, None
        this.begun = this.resumed = True
        this.digests = this.digests[: this.named]  # what follows was computed on another route
        self._wait_for_word(this, "settling", now)
        return out + self._settle(this)

    @staticmethod
    def _gone(message: Resume, gateway: NodeId, why: str) -> Send:
        return Send(gateway, Refused(message.renamed, "gone", one_line(why)))

    @staticmethod
    def _mended(old: Open, message: Resume) -> Open:
        prompt_tokens = old.known_tokens - old.output_tokens
        grown = old.known_tokens <= message.known_tokens <= old.reserve_tokens
        if not grown or message.known_tokens - message.output_tokens != prompt_tokens:
            raise BadMessage("a session that is resumed knows what it knew, and perhaps more")
        return replace(
            old,
            session=message.renamed,
            known_tokens=message.known_tokens,
            output_tokens=message.output_tokens,
            previous=message.previous,
            next=message.next,
        )

    def _rename(self, this: Session, mended: Open) -> None:
        former = this.open.session
        if this.computing or this.unkept:
            self._former[former] = this
        self._pages.leave(this)
        del self._sessions[former]
        this.open = mended
        self._sessions[mended.session] = this
        self._pages.stay(this)
        self.history.rename(former, mended.session)

    def _settle(self, this: Session) -> list[Instruction]:
        """No forward writes its pages any more: this is what it has."""
        if this.state != "settling" or this.closed or this.computing or this.unkept:
            return []
        self._former = {key: each for key, each in self._former.items() if each is not this}
        sure = min(this.computed, this.open.known_tokens - 1)
        self._pages.rewind(this, sure if self.config.rewinds else 0)
        self.history.truncate(this.open.session, this.position)
        this.state = "rejoining"
        return [Connect(this.open.session, this.open.next)]

    # ---- from Go on

    def _hold(
        self, this: Session, entry: RowEntry, hidden: memoryview, now: float
    ) -> list[Instruction]:
        """A row that came before we were told to go on, or while we send again what we sent."""
        tokens = entry.count + sum(each.count for each, _ in this.held)
        if tokens > this.open.reserve_tokens:
            return self._fail(this, "more rows than it has tokens", now)
        this.held.append((entry, hidden))
        return []

    def _fail(self, this: Session, why: str, now: float) -> list[Instruction]:
        told = Send(this.gateway, Lost(this.open.session, self.me, one_line(why)))
        return [told, *self._end(this), *self.admit(now)]

    def go(self, message: Go, sender: NodeId, now: float) -> list[Instruction]:
        """All stages of the mended route are there."""
        this = self._sessions.get(message.session)
        if this is None or this.closed or this.gateway != sender or this.state != "held":
            return []
        if message.redo:
            self._pages.rewind(this, 0)
            self.history.truncate(this.open.session, 0)
        this.state = "replaying"
        this.send_from = this.replay_from = message.send_from
        return self.replay_on(message.session, now)

    def replay_on(self, session: SessionId, now: float) -> list[Instruction]:
        """What was sent again so far is on its way: the next chunk, or the session runs."""
        this = self._sessions.get(session)
        if this is None or this.closed or this.state != "replaying":
            return []
        start, this.touched = this.replay_from, now
        if start >= this.position or self.ends(this.open.layers):
            return self._catch_up(this, now)
        chunk = self.config.chunk_tokens
        stop = this.replay_from = min(this.position, start - start % chunk + chunk)
        hidden = self.history.part(session, start, stop)
        if hidden is None:
            return self._fail(this, "what it sent is not kept (any more)", now)
        step = Step((RowEntry(session, start, stop - start),))
        return [Replay(session, this.open.next, step, hidden)]

    def _catch_up(self, this: Session, now: float) -> list[Instruction]:
        held, this.held = list(this.held), type(this.held)()
        out = self._run(this, now)
        for entry, hidden in held:
            out += self.receive(entry, hidden, this.open.previous, now)
        return out + self.admit(now)

    @abstractmethod
    def receive(
        self, entry: RowEntry, hidden: memoryview, sender: NodeId, now: float
    ) -> list[Instruction]:
        """A row that was held is taken like any other."""
