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

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ..engine.batcher import chunk_prompt
from ..engine.prefix import PrefixPool
from ..engine.request import Sampled
from ..engine.rows import Row
from ..errors import BadMessage
from ..events import PrefixMatched, SessionPreempted
from ..units import NodeId, SessionId
from .admission import Admission
from .messages import (
    Lost,
    Open,
    Opened,
    Preempted,
    RowEntry,
    Step,
    TokenEntry,
    Tokens,
    one_line,
)
from .opening import MakeSampler, Opening, refuse
from .session import (
    Connect,
    Drop,
    Enqueue,
    Forward,
    Instruction,
    Note,
    Send,
    Session,
    StageSessionsConfig,
)

__all__ = [
    "Connect",
    "Drop",
    "Enqueue",
    "Forward",
    "Instruction",
    "Note",
    "Send",
    "StageSessions",
    "StageSessionsConfig",
]


@dataclass
class StageSessions:
    """One stage's table of sessions.

    `first` and `last` say which ends of the model the stage holds. No session becomes longer than
    `context_length`: beyond it some models have no positions. `make_sampler` is called for sessions
    of a last stage: handed in, so that this file needs no torch.
    """

    me: NodeId
    first: bool
    last: bool
    vocab_size: int
    context_length: int
    pool: PrefixPool
    make_sampler: MakeSampler
    config: StageSessionsConfig = field(default_factory=StageSessionsConfig)
    _sessions: OrderedDict[SessionId, Session] = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        self._pages = Admission(self.pool, self.config, self._share)
        most = min(self.context_length, self.pool.total_tokens)
        self._opening = Opening(self.first, self.last, self.vocab_size, most, self.make_sampler)

    def __contains__(self, session: object) -> bool:
        return session in self._sessions

    def __len__(self) -> int:
        return len(self._sessions)

    def ids(self) -> list[SessionId]:
        return list(self._sessions)

    @property
    def waiting(self) -> int:
        return len(self._pages.waiting())

    def _share(self, gateway: NodeId) -> float:
        return 1.0 if gateway == self.me else self.config.gateway_share

    # ---- opening

    def open(
        self,
        message: Open,
        ids: Sequence[int],
        gateway: NodeId,
        now: float,
        digests: Sequence[bytes] = (),
    ) -> list[Instruction]:
        """A gateway wants a session here. Raises BadMessage where no honest gateway could have sent
        this.
        """
        known = self._sessions.get(message.session)
        if known is not None and known.gateway == gateway:
            raise BadMessage(f"session {message.session} is already open")
        if known is not None:  # a member of the ring was quicker: not this gateway's fault
            return [refuse(message, gateway, "gone", "the session's id is taken")]
        self._opening.check(message, ids)
        if never := self._opening.impossible(message, ids):
            return [refuse(message, gateway, "never", never)]
        if full := self._full(gateway):
            return [refuse(message, gateway, "busy", full)]
        sampler = self._opening.sampler(message, ids, gateway)
        if isinstance(sampler, Send):
            return [sampler]
        self._sessions[message.session] = Session(
            message,
            gateway,
            ids,
            self._usable(message, digests),
            deadline=now + min(message.patience_s, self.config.max_patience_s),
            touched=now,
            sampler=sampler,
        )
        return [Connect(message.session, message.next)]

    def _full(self, gateway: NodeId) -> str:
        """Why no session of this gateway can be added now, or ""."""
        most = self.config.max_sessions
        theirs = sum(each.gateway == gateway for each in self._sessions.values())
        if len(self._sessions) >= most or theirs >= most * self._share(gateway):
            return f"{len(self._sessions)} sessions are open here, {theirs} of them yours"
        return ""

    def _usable(self, message: Open, digests: Sequence[bytes]) -> list[bytes]:
        """None where the gateway counts in other pages than ours."""
        ours = message.page_tokens == self.pool.page_size and self.config.share_prefixes
        return list(digests) if ours else []

    def connected(self, session: SessionId, now: float) -> list[Instruction]:
        """The link to the next hop stands."""
        this = self._sessions.get(session)
        if this is None or this.state != "connecting":
            return []
        this.state = "waiting"
        self._pages.want(this)
        out = self.admit(now)
        waiting = self._pages.waiting()
        if len(waiting) > self.config.max_waiting:
            out.append(self._give_up(waiting[-1], f"{len(waiting)} sessions wait for pages"))
        return out

    def unreachable(self, session: SessionId, why: str) -> list[Instruction]:
        this = self._sessions.get(session)
        if this is None or this.state != "connecting":
            return []  # closed meanwhile, and perhaps opened anew
        del self._sessions[session]
        message = f"cannot reach the next stage {this.open.next}: {why}"
        return [refuse(this.open, this.gateway, "unreachable", message)]

    def admit(self, now: float) -> list[Instruction]:
        """Give pages to the sessions that want some, the oldest first. Call it again at
        `next_deadline`.
        """
        out = self._hand_out(now)
        late = [each for each in self._pages.waiting() if now >= each.deadline]
        if late:  # perhaps others have waited behind them
            out += [self._give_up(each, "older sessions have the pages") for each in late]
            out += self._hand_out(now)
        return out

    def _hand_out(self, now: float) -> list[Instruction]:
        out: list[Instruction] = []
        behind: set[NodeId] = set()  # gateways that have their share: their younger ones wait too
        blocked = False  # who waits to be opened is not overtaken by younger ones
        for this in self._pages.wanting():
            if this.closed:
                continue  # it had to go for one before it
            if this.state == "waiting":
                if self._pages.crowds(this):
                    behind.add(this.gateway)
                if blocked or this.gateway in behind:
                    continue
            verdict = self._satisfy(this, now, out)
            if verdict == "soon":
                this.deadline = max(this.deadline, now + self.config.grace_s)
                break
            blocked = blocked or verdict == "wait"
        return out

    def _satisfy(
        self, this: Session, now: float, out: list[Instruction]
    ) -> Literal["done", "soon", "wait"]:
        while not this.closed:
            match self._pages.ask(this):
                case Session() as youngest:
                    out += self._preempt(youngest)
                case "granted":
                    out += self._go_on(this) if this.state == "running" else self._start(this, now)
                    if not this.pending:
                        return "done"
                case verdict:
                    return verdict
        return "done"

    def next_deadline(self) -> float | None:
        return min((each.deadline for each in self._pages.waiting()), default=None)

    def _give_up(self, this: Session, why: str) -> Send:
        del self._sessions[this.open.session]
        self._pages.leave(this)
        free = f"{self.pool.free_tokens} of {self.pool.total_tokens} tokens are free"
        return refuse(this.open, this.gateway, "busy", f"{why}; {free}")

    def _start(self, this: Session, now: float) -> list[Instruction]:
        this.state, this.touched = "running", now
        out: list[Instruction] = [Send(this.gateway, Opened(this.open.session, this.position))]
        if self.first:
            out.append(self._begun(this))
            chunks = chunk_prompt(this.ids, self.config.chunk_tokens, this.position)
            for start, chunk in chunks:
                out += self._take(this, Row(this.open.session, start, (), len(chunk), chunk))
        this.ids = ()
        return out

    @staticmethod
    def _begun(this: Session) -> Note:
        """From `position` on it is computed here."""
        this.begun = True
        return Note(PrefixMatched(this.open.model, this.open.known_tokens, this.position))

    # ---- running

    def sending_to(self, nodes: Collection[NodeId]) -> frozenset[SessionId]:
        """The sessions whose next hop is one of these."""
        if not nodes:
            return frozenset()
        return frozenset(key for key, each in self._sessions.items() if each.open.next in nodes)

    def _accept(self, this: Session, row: Row, now: float) -> list[Instruction]:
        """The next row, which waits when there are no pages for it."""
        out = self._take(this, row)
        return out + self.admit(now) if this.pending else out

    def _take(self, this: Session, row: Row) -> list[Instruction]:
        this.position = row.stop
        sampler = this.sampler if this.samples_at(row.stop) else None
        this.pending.append(replace(row, sampler=sampler, owner=this.gateway))
        return self._go_on(this)

    def _go_on(self, this: Session) -> list[Instruction]:
        """With the rows that have pages."""
        out: list[Instruction] = []
        while this.pending and this.pending[0].stop <= len(this.pages) * self.pool.page_size:
            out.append(Enqueue(replace(this.pending.popleft(), pages=this.pages)))
        if this.pending:
            self._pages.want(this)
        return out

    def _from(self, sender: NodeId, session: SessionId) -> Session | None:
        """The session, if it runs and `sender` is whom it listens to. It may have been closed while
        the frame was under way; a stranger is not heard.
        """
        this = self._sessions.get(session)
        heard = this is not None and not this.closed and this.state == "running"
        return this if heard and this is not None and sender == this.open.previous else None

    def receive(
        self, entry: RowEntry, hidden: memoryview, sender: NodeId, now: float
    ) -> list[Instruction]:
        """Rows from the stage before us. It may compute more of a prefix than we would have to."""
        this = self._from(sender, entry.session)
        if this is None or self.first:
            return []
        out: list[Instruction] = []
        if not this.begun and entry.start in range(0, this.position + 1, self.pool.page_size):
            self._pages.trim(this, entry.start)
            out.append(self._begun(this))
        if entry.start != this.position:
            why = f"expected position {this.position}, got {entry.start}"
            return self.fail(entry.session, why, now, blame=sender)
        if entry.start + entry.count > this.open.reserve_tokens:
            why = f"it outgrew the {this.open.reserve_tokens} tokens it reserved"
            return self.fail(entry.session, why, now, blame=sender)
        row = Row(entry.session, entry.start, (), entry.count, wire=hidden)
        return out + self._accept(this, row, now)

    def unreadable(
        self, session: SessionId, sender: NodeId, why: str, now: float
    ) -> list[Instruction]:
        """The stage before us sent rows that are not of our model."""
        this = self._from(sender, session)
        return self.fail(session, why, now, blame=sender) if this and not self.first else []

    def token(self, entry: TokenEntry, sender: NodeId, now: float) -> list[Instruction]:
        """The last stage chose a token: the first stage computes it next."""
        this = self._from(sender, entry.session)
        if this is None or not self.first:
            return []  # perhaps meant for the gateway on this same node
        if not 0 <= entry.sampled.token < self.vocab_size:
            why = f"token id {entry.sampled.token} is outside the vocabulary of {self.vocab_size}"
            return self.fail(entry.session, why, now, blame=sender)
        if this.position - this.prompt_tokens != entry.index:
            why = f"token {entry.index} came out of turn"
            return self.fail(entry.session, why, now, blame=sender)
        if entry.sampled.finish or this.position >= this.open.reserve_tokens:
            return []  # the gateway will close it
        row = Row(entry.session, this.position, (), 1, ids=(entry.sampled.token,))
        return self._accept(this, row, now)

    def begin(self, rows: Sequence[Row]) -> None:
        """These rows are being computed: their pages must not be given away."""
        for row in rows:
            self._sessions[row.session].computing += 1

    def finish(
        self, rows: Sequence[Row], sampled: Sequence[Sampled | None], now: float
    ) -> list[Instruction]:
        """The forward is done: `sampled[i]` belongs to `rows[i]`. One Forward per next hop, one
        Tokens per reader.
        """
        freed = False
        steps: dict[NodeId, tuple[list[RowEntry], list[int]]] = {}
        tokens: dict[NodeId, list[TokenEntry]] = {}
        out: list[Instruction] = []
        for index, (row, choice) in enumerate(zip(rows, sampled, strict=True)):
            this = self._sessions[row.session]
            this.computing -= 1
            this.touched, this.computed = now, row.stop
            self._pages.name(this)
            if this.closed:
                if this.computing == 0:
                    self._release(this)
                    freed = True
            elif not self.last:
                entries, indices = steps.setdefault(this.open.next, ([], []))
                entries.append(RowEntry(row.session, row.start, row.count))
                indices.append(index)
            elif choice is not None:
                self._report(this, row, choice, tokens)
        out += [
            Forward(node, Step(tuple(entries)), tuple(at)) for node, (entries, at) in steps.items()
        ]
        out += [Send(node, Tokens(tuple(entries))) for node, entries in tokens.items()]
        return out + self.admit(now) if freed else out

    @staticmethod
    def _report(
        this: Session, row: Row, choice: Sampled, tokens: dict[NodeId, list[TokenEntry]]
    ) -> None:
        """The gateway gets all of it; the first stage, when it is somebody else, just what it needs
        to go on.
        """
        index = row.stop - this.prompt_tokens
        tokens.setdefault(this.gateway, []).append(TokenEntry(this.open.session, index, choice))
        if this.open.next != this.gateway:
            bare = Sampled(choice.token, choice.finish)
            tokens.setdefault(this.open.next, []).append(TokenEntry(this.open.session, index, bare))

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
        this.digests = [*this.digests, *self._usable(this.open, digests)]
        return self._end(this) + self.admit(now)

    def end_idle(self, now: float) -> list[Instruction]:
        """Call it now and then: a gateway that stays connected and silent holds nothing forever."""
        out: list[Instruction] = []
        for this in list(self._sessions.values()):
            idle = now - this.touched >= self.config.idle_s
            if idle and this.state != "waiting" and this.computing == 0:  # those have deadlines
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
                out += self.fail(this.open.session, why, now, blame=node)
        return out + self.admit(now)

    def _preempt(self, this: Session) -> list[Instruction]:
        told = Send(this.gateway, Preempted(this.open.session))
        return [told, Note(SessionPreempted(this.open.model)), *self._end(this)]

    def _end(self, this: Session) -> list[Instruction]:
        """Its pages may be wanted by others: `admit` them afterwards."""
        this.closed = True
        this.pending.clear()
        self._pages.leave(this)
        if this.computing == 0:
            self._release(this)
        return [Drop(this.open.session)]

    def _release(self, this: Session) -> None:
        self._sessions.pop(this.open.session, None)
        self._pages.name(this)
        self._pages.release(this)
