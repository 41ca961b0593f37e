"""The sessions of one stage: messages in, instructions out. No socket, no clock, no tensor
arithmetic.

A session here is a place in the ring: who may send us rows, whom we send ours, and its pages. Its
life: Open -> (link to the next hop is made) -> (it gets pages, at once or after queueing) -> rows
-> Close. Pages are given as they are needed (`admission.py`); a session that has to make room for
an older one is ended with Preempted, and its gateway opens it again. Whoever runs this object
carries out the instructions and tells it which rows are being computed, so that the pages of a
session that is closed in the middle of a forward are given back only after it.

What reaches us from a neighbour depends on what the gateway told that neighbour, and gateways may
be hostile: rows and tokens that do not fit end the session, or are passed over; only what a node
alone can have got wrong is a BadMessage, which costs it the link.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass

from ..engine.request import Sampled
from ..engine.rows import Row
from ..units import NodeId, SessionId
from .messages import Lost, RowEntry, Step, TokenEntry, one_line, tokens_in_frames
from .resuming import ResumingSessions
from .session import (
    Connect,
    Drop,
    Enqueue,
    Forward,
    Instruction,
    Note,
    Replay,
    Send,
    Session,
    StageSessionsConfig,
)

HEARS = ("running", "held", "replaying")

__all__ = [
    "Connect",
    "Drop",
    "Enqueue",
    "Forward",
    "Instruction",
    "Note",
    "Replay",
    "Send",
    "StageSessions",
    "StageSessionsConfig",
]


@dataclass
class StageSessions(ResumingSessions):
    """The sessions of one stage, those that run above all: rows and tokens in, results out."""

    # ---- running

    def prompting(self, nodes: Collection[NodeId]) -> Container[SessionId]:
        """The sessions whose prompt goes to one of these. Those that generate have one row on the
        way at most, and it overtakes prompts.
        """
        return _Prompting(self._sessions, nodes) if nodes else ()

    def _accept(self, this: Session, row: Row, now: float) -> list[Instruction]:
        """The next row, which waits when there are no pages for it."""
        out = self._take(this, row)
        return out + self.admit(now) if this.pending else out

    def _from(self, sender: NodeId, session: SessionId) -> Session | None:
        """The session, if it runs and `sender` is whom it listens to. It may have been closed while
        the frame was under way; a stranger is not heard.
        """
        this = self._sessions.get(session)
        heard = this is not None and not this.closed and this.state in HEARS
        return this if heard and this is not None and sender == this.open.previous else None

    def receive(
        self, entry: RowEntry, hidden: memoryview, sender: NodeId, now: float
    ) -> list[Instruction]:
        """Rows from the stage before us. It may compute more of a prefix than we would have to."""
        this = self._from(sender, entry.session)
        if this is None or self.begins(this.open.layers):
            return []
        if this.state != "running":
            return self._hold(this, entry, hidden, now)
        out: list[Instruction] = []
        if not this.begun and entry.start in range(0, this.position + 1, self.pool.page_size):
            self._pages.trim(this, entry.start)
            out.append(self._begun(this))
        if why := this.misplaced(entry, self.vocab_size):
            if this.begun and entry.start > this.position:  # some are amiss: what we have is right
                return [*out, *self.suspend(this, sender, why, now)]
            return self.fail(entry.session, why, now, blame=sender)
        row = Row(entry.session, entry.start, (), entry.count, wire=hidden, draft=entry.draft)
        return out + self._accept(this, row, now)

    def unreadable(
        self, session: SessionId, sender: NodeId, why: str, now: float
    ) -> list[Instruction]:
        """The stage before us sent rows that are not of our model."""
        this = self._from(sender, session)
        if this is None or self.begins(this.open.layers):
            return []
        return self.fail(session, why, now, blame=sender)

    def token(self, entry: TokenEntry, sender: NodeId, now: float) -> list[Instruction]:
        """The last stage chose a token, or several: the first stage computes the last one next."""
        this = self._from(sender, entry.session)
        if this is None or this.state != "running" or not self.begins(this.open.layers):
            return []  # perhaps meant for the gateway on this same node
        if why := this.unexpected(entry, self.vocab_size):
            return self.fail(entry.session, why, now, blame=sender)
        tokens = [each.token for each in entry.tokens]
        if this.drafting is not None:
            this.drafting.learn(tokens, len(this.draft))
        start = this.sure + len(entry.foretold)
        if entry.sampled.finish or start >= this.open.reserve_tokens:
            return []  # the gateway will close it
        return self._accept(this, Row(entry.session, start, (), 1, ids=tokens[-1:]), now)

    def begin(self, rows: Sequence[Row]) -> None:
        """These rows are being computed: their pages must not be given away."""
        for row in rows:
            self._sessions[row.session].computing += 1

    def finish(
        self, rows: Sequence[Row], sampled: Sequence[Sequence[Sampled]], now: float
    ) -> list[Instruction]:
        """The forward is done: `sampled[i]` belongs to `rows[i]`, empty where none was asked for.
        A Forward per next hop for those who generate and one for prompts; mostly one Tokens per
        reader.
        """
        freed = False
        steps: dict[tuple[NodeId | None, bool], tuple[list[RowEntry], list[int]]] = {}
        tokens: dict[NodeId, list[TokenEntry]] = {}
        out: list[Instruction] = []
        for index, (row, chosen) in enumerate(zip(rows, sampled, strict=True)):
            this = self._whose(row.session)
            this.computing -= 1
            this.touched, this.computed = now, row.stop - len(row.draft)
            self._pages.name(this)
            if not this.computing:  # nobody reads them now
                self._pages.forget_the_distant(this)
            if this.closed:
                if this.computing == 0:
                    self._release(this)
                    freed = True
            elif not self.ends(this.open.layers):
                # who generates has all that went before at its tail: it overtakes none of its own
                to = self._reader(this, row), row.start < this.open.known_tokens
                entries, indices = steps.setdefault(to, ([], []))
                entries.append(RowEntry(row.session, row.start, row.count, tuple(row.draft)))
                indices.append(index)
                this.unkept += 1
            elif chosen and row.session == this.open.session:
                self._report(this, row, chosen, tokens)
            out += self._settle(this)
        out += [
            Forward(node, Step(tuple(entries)), tuple(at), bulk)
            for (node, bulk), (entries, at) in sorted(steps.items(), key=lambda step: step[0][1])
        ]
        for node, reported in tokens.items():
            out += [Send(node, message) for message in tokens_in_frames(reported)]
        return out + self.admit(now) if freed else out

    def _whose(self, session: SessionId) -> Session:
        """Of a row that is being computed, which may go by a former id."""
        return self._sessions.get(session) or self._former[session]

    @staticmethod
    def _reader(this: Session, row: Row) -> NodeId | None:
        """Whom its hidden states are sent to: nobody who has them, or is gone."""
        wanted = this.state == "running" and row.stop > this.send_from
        return this.open.next if wanted and row.session == this.open.session else None

    def keep(self, message: Step, hidden: memoryview) -> list[Instruction]:
        """The hidden states of a Forward: they may have to be sent again."""
        out: list[Instruction] = []
        at, width = 0, len(hidden) // sum(entry.count for entry in message.rows)
        for entry in message.rows:
            part = hidden[at : at + entry.count * width]
            at += entry.count * width
            this = self._sessions.get(entry.session) or self._former.get(entry.session)
            if this is None or this.closed:
                continue
            this.unkept -= 1
            self.history.keep(this.open.session, entry.start, entry.count, part)
            out += self._settle(this)
        return out

    def failed(self, row: Row, why: str, now: float) -> list[Instruction]:
        """The engine could not compute it: its pages hold nothing new."""
        this = self._whose(row.session)
        this.computing -= 1
        if not this.closed:
            return self.fail(this.open.session, why, now)
        if this.computing == 0:
            self._release(this)
        return self.admit(now)

    @staticmethod
    def _report(
        this: Session, row: Row, chosen: Sequence[Sampled], tokens: dict[NodeId, list[TokenEntry]]
    ) -> None:
        """The gateway gets all of it; the first stage, when it is somebody else, just what it needs
        to go on.
        """
        session, index = this.open.session, row.stop - len(row.draft) - this.prompt_tokens
        *foretold, last = chosen
        whole = TokenEntry(session, index, last, tuple(foretold))
        tokens.setdefault(this.gateway, []).append(whole)
        if this.open.next != this.gateway:
            *foretold, last = (Sampled(each.token, each.finish) for each in chosen)
            bare = TokenEntry(session, index, last, tuple(foretold))
            tokens.setdefault(this.open.next, []).append(bare)

    # ---- ending

    def close(
        self, session: SessionId, sender: NodeId, now: float, digests: Sequence[bytes] = ()
    ) -> list[Instruction]:
        """`digests` are those of the whole pages after the ones named in the Open: what was
        computed of these can be found again.
        """
        this = self._sessions.get(session)
        if this is None or this.closed or sender != this.gateway:
            return []
        if not this.resumed:
            this.digests = [*this.digests, *self._usable(this.open, digests)]
        return self._end(this) + self.admit(now)

    def end_idle(self, now: float) -> list[Instruction]:
        """Call it now and then: a gateway that stays connected and silent holds nothing forever."""
        out: list[Instruction] = []
        for this in list(self._sessions.values()):
            idle = now - this.touched >= self.config.idle_s
            timed = this.quiet or this.state == "waiting"  # these have deadlines
            if idle and not timed and this.computing == 0:
                out += self.fail(this.open.session, "no row came for too long", now)
        return out

    def fail(
        self, session: SessionId, why: str, now: float, blame: NodeId | None = None
    ) -> list[Instruction]:
        """We cannot go on: tell the gateway, which will look for another route."""
        this = self._sessions.get(session)
        if this is None or this.closed:
            return []
        told = Send(this.gateway, Lost(session, blame or self.me, one_line(why)))
        return [told, *self._end(this), *self.admit(now)]

    def node_lost(self, node: NodeId, why: str, now: float) -> list[Instruction]:
        """A link went down. Sessions of a dead gateway end; a dead neighbour is reported to the
        gateway.
        """
        out: list[Instruction] = []
        for this in list(self._sessions.values()):
            if this.closed:
                continue
            if this.gateway == node:
                out += self._end(this)
            elif node in (this.open.next, this.open.previous):
                out += self._neighbour_lost(this, node, why, now)
        return out + self.admit(now)

    def _neighbour_lost(
        self, this: Session, node: NodeId, why: str, now: float
    ) -> list[Instruction]:
        if this.state in ("connecting", "waiting"):
            return self.fail(this.open.session, why, now, blame=node)
        return self.suspend(this, node, why, now)


@dataclass(frozen=True, slots=True)
class _Prompting:
    """Asked of a few at every step: all sessions are never gone through."""

    sessions: Mapping[SessionId, Session]
    nodes: Collection[NodeId]

    def __contains__(self, session: object) -> bool:
        this = self.sessions.get(session)  # type: ignore[call-overload]
        return (
            this is not None
            and this.open.next in self.nodes
            and this.computed < this.open.known_tokens
        )
