"""A stage's sessions until they run and when they end: who comes in, who gets pages, who goes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ..engine.batcher import chunk_prompt
from ..engine.prefix import PrefixPool
from ..engine.rows import Row
from ..errors import BadMessage
from ..events import PrefixMatched, SessionPreempted
from ..units import NodeId, SessionId, Slice
from .admission import Admission
from .drafting import Drafting, Guesses
from .history import History
from .messages import Load, Lost, Open, Opened, Preempted, one_line
from .opening import MakeSampler, Opening, refuse
from .session import (
    Connect,
    Drop,
    Enqueue,
    Instruction,
    Note,
    Send,
    Session,
    StageSessionsConfig,
    State,
)


@dataclass
class SessionTable:
    """Who is here.

    `first` and `last` say which ends of the model the stage holds, `layers` what lies between them:
    a session may run a part of it (of the whole where it is None). No session becomes longer than
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
    layers: Slice | None = None
    _sessions: OrderedDict[SessionId, Session] = field(default_factory=OrderedDict)
    _some_quiet: bool = False  # perhaps
    _former: dict[SessionId, Session] = field(default_factory=dict)  # ids that rows still go by

    def __post_init__(self) -> None:
        self.history = History(self.config.history_bytes)
        self._pages = Admission(self.pool, self.config, self._share)
        most = min(self.context_length, self.pool.total_tokens)
        self.guesses = Guesses(self._sessions, self.config, self.pool.page_size, self.vocab_size)
        self._opening = Opening(self.begins, self.ends, self.vocab_size, most, self.make_sampler)

    def begins(self, part: Slice) -> bool:
        """Whether who runs this part is the first stage of its session's route."""
        return self.first and (self.layers is None or part.start == self.layers.start)

    def ends(self, part: Slice) -> bool:
        """Whether it is the last."""
        return self.last and (self.layers is None or part.stop == self.layers.stop)

    def __contains__(self, session: object) -> bool:
        return session in self._sessions

    def __len__(self) -> int:
        return len(self._sessions)

    def ids(self) -> list[SessionId]:
        return list(self._sessions)

    @property
    def waiting(self) -> int:
        return len(self._pages.waiting())

    @property
    def load(self) -> Load:
        return Load(len(self) - self.waiting, self.waiting, self.pool.free_tokens)

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
        known = self._sessions.get(message.session) or self._former.get(message.session)
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
        if this is not None and this.state == "rejoining":
            return self._rejoined(this)
        if this is None or this.state != "connecting":
            return []
        this.state = "waiting"
        self._pages.want(this)
        out = self.admit(now)
        waiting = self._pages.waiting()
        if len(waiting) > self.config.max_waiting:
            out.append(self._give_up(waiting[-1], f"{len(waiting)} sessions wait for pages"))
        return out

    def _rejoined(self, this: Session) -> list[Instruction]:
        """It has its place on the mended route, and waits for Go."""
        this.state, session = "held", this.open.session
        kept_from = self.history.first(session)
        kept_from = this.position if kept_from is None else min(kept_from, this.position)
        return [Send(this.gateway, Opened(session, this.position, kept_from, self.load))]

    def unreachable(self, session: SessionId, why: str) -> list[Instruction]:
        this = self._sessions.get(session)
        if this is not None and this.state == "rejoining":
            this.state = "suspended"
            return [Send(this.gateway, Lost(session, this.open.next, one_line(why), kept=True))]
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
        forgotten = [each for each in self._quiet() if now >= each.deadline]
        for this in forgotten:
            why = "nobody said how to go on"
            out += [Send(this.gateway, Lost(this.open.session, self.me, why)), *self._end(this)]
        return out + self._hand_out(now) if forgotten else out

    def _quiet(self) -> list[Session]:
        """Mostly there are none, and nobody is looked at."""
        if not self._some_quiet:
            return []
        quiet = [each for each in self._sessions.values() if each.quiet and not each.closed]
        self._some_quiet = bool(quiet)
        return quiet

    def _wait_for_word(self, this: Session, state: State, now: float) -> None:
        """From its gateway, for a moment."""
        this.state, this.deadline = state, now + self.config.resume_grace_s
        self._some_quiet = True

    def _hand_out(self, now: float) -> list[Instruction]:
        out: list[Instruction] = []
        behind: set[NodeId] = set()  # gateways that have their share: their younger ones wait too
        blocked = False  # who waits to be opened is not overtaken by younger ones
        for this in self._pages.wanting():
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
        while not this.closed:  # it may have had to go, for an older one or by itself
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
        deadlines = (each.deadline for each in (*self._pages.unopened(), *self._quiet()))
        return min(deadlines, default=None)

    def _give_up(self, this: Session, why: str) -> Send:
        del self._sessions[this.open.session]
        self._pages.leave(this)
        free = f"{self.pool.free_tokens} of {self.pool.total_tokens} tokens are free"
        return refuse(this.open, this.gateway, "busy", f"{why}; {free}")

    def _start(self, this: Session, now: float) -> list[Instruction]:
        session = this.open.session
        opened = Send(this.gateway, Opened(session, this.position, load=self.load))
        if not this.open.hold:
            return [opened, *self._run(this, now)]
        self._wait_for_word(this, "held", now)
        return [opened]

    def _run(self, this: Session, now: float) -> list[Instruction]:
        """It has its pages, and all stages are there."""
        this.state, this.touched = "running", now
        out: list[Instruction] = []
        if self.begins(this.open.layers):
            out += [] if this.resumed else [self._begun(this)]
            this.drafting = Drafting(this.ids) if self.config.draft_positions else None
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

    # ---- rows and pages

    def _take(self, this: Session, row: Row) -> list[Instruction]:
        if row.start < this.send_from < row.stop and not row.draft:
            known, new = row.cut(this.send_from - row.start)  # the next stage has the former
            return self._take(this, known) + self._take(this, new)
        this.position, this.draft = row.stop, row.draft
        sampler = this.sampler if this.samples_at(row.stop) else None
        part = None if self.layers in (None, this.open.layers) else this.open.layers
        this.pending.append(replace(row, sampler=sampler, owner=this.gateway, layers=part))
        return self._go_on(this)

    def _go_on(self, this: Session) -> list[Instruction]:
        """With the rows that have pages."""
        out: list[Instruction] = []
        while this.pending and this.pending[0].stop <= len(this.pages) * self.pool.page_size:
            out.append(Enqueue(replace(this.pending.popleft(), pages=this.pages)))
        if this.pending:
            self._pages.want(this)
        return out

    # ---- going

    def _preempt(self, this: Session) -> list[Instruction]:
        told = Send(this.gateway, Preempted(this.open.session))
        return [told, Note(SessionPreempted(this.open.model)), *self._end(this)]

    def _end(self, this: Session) -> list[Instruction]:
        """Its pages may be wanted by others: `admit` them afterwards."""
        this.closed = True
        this.pending.clear()
        this.held.clear()
        self.history.forget(this.open.session)
        self._pages.leave(this)
        if this.computing == 0:
            self._release(this)
        return [Drop(this.open.session)]

    def _release(self, this: Session) -> None:
        self._sessions.pop(this.open.session, None)
        self._former = {key: each for key, each in self._former.items() if each is not this}
        self._pages.name(this)
        self._pages.release(this)
