"""The sessions of one stage: messages in, instructions out. No socket, no clock, no tensor
arithmetic.

A session here is a place in the ring: who may send us rows, whom we send ours, and the pages set
aside for it. Its life: Open -> (link to the next hop is made) -> (pages are set aside, at once or
after queueing) -> rows -> Close. Whoever runs this object carries out the instructions and tells it
which rows are being computed, so that the pages of a session that is closed in the middle of a
forward are given back only after it.

What reaches us from a neighbour depends on what the gateway told that neighbour, and gateways may
be hostile: rows and tokens that do not fit end the session, or are passed over; only what a node
alone can have got wrong is a BadMessage, which costs it the link.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ..engine.batcher import chunk_prompt
from ..engine.request import Sampled, Sampling
from ..engine.rows import Row
from ..errors import BadMessage, NoCapacity, Overloaded
from ..units import NodeId, SessionId
from .messages import Lost, Open, Opened, Refused, RowEntry, Step, TokenEntry, Tokens, one_line

if TYPE_CHECKING:
    from torch import Tensor

    from ..engine.pages import PagePool
    from ..engine.sampling import SamplerState


@dataclass(frozen=True, slots=True)
class Connect:
    """Make sure there is a link to `node`, then call `connected` or `unreachable`."""

    session: SessionId
    node: NodeId


@dataclass(frozen=True, slots=True)
class Send:
    node: NodeId
    message: Opened | Refused | Lost | Tokens


@dataclass(frozen=True, slots=True)
class Forward:
    """Send the hidden states of these rows (indices into the step) to the next hop."""

    node: NodeId
    message: Step
    rows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Enqueue:
    row: Row


@dataclass(frozen=True, slots=True)
class Drop:
    """Rows of this session that wait for a forward are not wanted any more."""

    session: SessionId


Instruction = Connect | Send | Forward | Enqueue | Drop


@dataclass(kw_only=True, frozen=True, slots=True)
class StageSessionsConfig:
    max_sessions: int = 256
    max_waiting: int = 256  # opens that queue for pages
    chunk_tokens: int = 256  # prompts are cut at multiples of this, counted from position 0
    max_patience_s: float = 120.0
    idle_s: float = 600.0  # no row for so long: its gateway, which would have given up, is silent
    gateway_share: float = 1.0  # of sessions and pages, for one node other than ourselves


@dataclass(slots=True)
class _Session:
    open: Open
    gateway: NodeId
    first: bool
    last: bool
    ids: Sequence[int]  # what the gateway gave us: prompt, then output so far; () once running
    state: Literal["connecting", "waiting", "running"] = "connecting"
    deadline: float = 0.0
    touched: float = 0.0  # when it last got on
    pages: tuple[int, ...] = ()
    position: int = 0  # tokens whose rows we have accepted
    sampler: SamplerState | None = None
    computing: int = 0  # rows of ours in the running forward
    closed: bool = False

    def samples_at(self, stop: int) -> bool:
        return stop >= self.open.known_tokens


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
    pool: PagePool
    make_sampler: Callable[[Sampling, Sequence[int], Sequence[int]], SamplerState]
    config: StageSessionsConfig = field(default_factory=StageSessionsConfig)
    _sessions: OrderedDict[SessionId, _Session] = field(default_factory=OrderedDict)

    def __contains__(self, session: object) -> bool:
        return session in self._sessions

    def __len__(self) -> int:
        return len(self._sessions)

    def ids(self) -> list[SessionId]:
        return list(self._sessions)

    @property
    def waiting(self) -> int:
        return sum(each.state == "waiting" for each in self._sessions.values())

    # ---- opening

    def open(
        self, message: Open, ids: Sequence[int], gateway: NodeId, now: float
    ) -> list[Instruction]:
        """A gateway wants a session here. Raises BadMessage where no honest gateway could have sent
        this.
        """
        known = self._sessions.get(message.session)
        if known is not None and known.gateway == gateway:
            raise BadMessage(f"session {message.session} is already open")
        if known is not None:  # a member of the ring was quicker: not this gateway's fault
            return [self._refuse(message, gateway, "gone", "the session's id is taken")]
        self._check_open(message, ids)
        if never := self._impossible(message, ids):
            return [self._refuse(message, gateway, "never", never)]
        if full := self._full(gateway):
            return [self._refuse(message, gateway, "busy", full)]
        self._sessions[message.session] = _Session(
            message,
            gateway,
            self.first,
            self.last,
            ids,
            deadline=now + min(message.patience_s, self.config.max_patience_s),
            touched=now,
        )
        return [Connect(message.session, message.next)]

    def _check_open(self, message: Open, ids: Sequence[int]) -> None:
        if self.first and len(ids) != message.known_tokens:
            raise BadMessage(
                f"the first stage needs {message.known_tokens} token ids, got {len(ids)}"
            )
        if len(ids) not in (0, message.output_tokens, message.known_tokens):
            raise BadMessage("token ids must be all known ones, the output's, or none")
        if self.last and message.sampling is None:
            raise BadMessage("the last stage needs the sampling settings")

    def _impossible(self, message: Open, ids: Sequence[int]) -> str:
        """Why this session can never be here, or ""."""
        longest = min(self.context_length, self.pool.total_tokens)
        if message.reserve_tokens > longest:
            return f"{message.reserve_tokens} tokens wanted, a session here has {longest} at most"
        if ids and max(ids) >= self.vocab_size:
            return f"token id {max(ids)} is outside the vocabulary of {self.vocab_size}"
        return ""

    def _full(self, gateway: NodeId) -> str:
        """Why no session of this gateway can be added now, or ""."""
        most = self.config.max_sessions
        theirs = sum(each.gateway == gateway for each in self._sessions.values())
        if len(self._sessions) >= most or theirs >= most * self._share(gateway):
            return f"{len(self._sessions)} sessions are open here, {theirs} of them yours"
        return ""

    def _share(self, gateway: NodeId) -> float:
        return 1.0 if gateway == self.me else self.config.gateway_share

    def _has_its_share(self, this: _Session) -> bool:
        """One session may have all the pages; several of one gateway only its share of them."""
        held = sum(
            len(each.pages) * self.pool.page_size
            for each in self._sessions.values()
            if each.gateway == this.gateway
        )
        most = self.pool.total_tokens * self._share(this.gateway)
        return held > 0 and held + this.open.reserve_tokens > most

    def connected(self, session: SessionId, now: float) -> list[Instruction]:
        """The link to the next hop stands."""
        this = self._sessions.get(session)
        if this is None or this.state != "connecting":
            return []
        this.state = "waiting"
        return self.admit(now)

    def unreachable(self, session: SessionId, why: str) -> list[Instruction]:
        this = self._sessions.get(session)
        if this is None or this.state != "connecting":
            return []  # closed meanwhile, and perhaps opened anew
        del self._sessions[session]
        message = f"cannot reach the next stage {this.open.next}: {why}"
        return [self._refuse(this.open, this.gateway, "unreachable", message)]

    def admit(self, now: float) -> list[Instruction]:
        """Give pages to the sessions that wait, first come first served. Call it again at
        `next_deadline`.
        """
        out: list[Instruction] = []
        blocked = False  # one that waits for more room is not overtaken by smaller ones
        for this in [each for each in self._sessions.values() if each.state == "waiting"]:
            crowding = self._has_its_share(this)
            try:
                if blocked or crowding:
                    raise Overloaded("others wait for pages, or are to have their share of them")
                this.pages = self.pool.allocate(this.open.reserve_tokens)
            except Overloaded as full:
                blocked = blocked or not crowding
                if now >= this.deadline or self.waiting > self.config.max_waiting:
                    out.append(self._give_up(this, "busy", full.message))
            except NoCapacity as never:
                out.append(self._give_up(this, "never", never.message))
            else:
                out += self._start(this, now)
        return out

    def next_deadline(self) -> float | None:
        return min(
            (each.deadline for each in self._sessions.values() if each.state == "waiting"),
            default=None,
        )

    def _give_up(self, this: _Session, reason: Literal["busy", "never"], why: str) -> Send:
        del self._sessions[this.open.session]
        return self._refuse(this.open, this.gateway, reason, why)

    def _refuse(
        self,
        message: Open,
        gateway: NodeId,
        reason: Literal["busy", "never", "gone", "unreachable"],
        why: str,
    ) -> Send:
        return Send(gateway, Refused(message.session, reason, one_line(why)))

    def _start(self, this: _Session, now: float) -> list[Instruction]:
        this.state, this.touched = "running", now
        if this.last and this.open.sampling is not None:
            prompt, output = self._split_ids(this)
            this.sampler = self.make_sampler(this.open.sampling, prompt, output)
        out: list[Instruction] = [Send(this.gateway, Opened(this.open.session))]
        if this.first:
            for start, chunk in chunk_prompt(this.ids, self.config.chunk_tokens):
                out.append(Enqueue(self._row(this, start, len(chunk), ids=chunk)))
        this.ids = ()
        return out

    @staticmethod
    def _split_ids(this: _Session) -> tuple[Sequence[int], Sequence[int]]:
        prompt_tokens = len(this.ids) - this.open.output_tokens
        return this.ids[:prompt_tokens], this.ids[prompt_tokens:]

    # ---- running

    def sending_to(self, nodes: Collection[NodeId]) -> frozenset[SessionId]:
        """The sessions whose next hop is one of these."""
        if not nodes:
            return frozenset()
        return frozenset(key for key, each in self._sessions.items() if each.open.next in nodes)

    def _row(
        self,
        this: _Session,
        start: int,
        count: int,
        *,
        ids: Sequence[int] | None = None,
        hidden: Tensor | None = None,
    ) -> Row:
        this.position = start + count
        sampler = this.sampler if this.samples_at(start + count) else None
        return Row(this.open.session, start, this.pages, count, ids, hidden, sampler)

    def _from(self, sender: NodeId, session: SessionId) -> _Session | None:
        """The session, if it runs and `sender` is whom it listens to. It may have been closed while
        the frame was under way; a stranger is not heard.
        """
        this = self._sessions.get(session)
        heard = this is not None and not this.closed and this.state == "running"
        return this if heard and this is not None and sender == this.open.previous else None

    def receive(
        self, entry: RowEntry, hidden: Tensor, sender: NodeId, now: float
    ) -> list[Instruction]:
        """Rows from the stage before us."""
        this = self._from(sender, entry.session)
        if this is None or this.first:
            return []
        if entry.start != this.position:
            why = f"expected position {this.position}, got {entry.start}"
            return self.fail(entry.session, why, now, blame=sender)
        if entry.start + entry.count > this.open.reserve_tokens:
            why = f"it outgrew the {this.open.reserve_tokens} tokens it reserved"
            return self.fail(entry.session, why, now, blame=sender)
        return [Enqueue(self._row(this, entry.start, entry.count, hidden=hidden))]

    def unreadable(
        self, session: SessionId, sender: NodeId, why: str, now: float
    ) -> list[Instruction]:
        """The stage before us sent rows that are not of our model."""
        this = self._from(sender, session)
        return self.fail(session, why, now, blame=sender) if this and not this.first else []

    def token(self, entry: TokenEntry, sender: NodeId, now: float) -> list[Instruction]:
        """The last stage chose a token: the first stage computes it next."""
        this = self._from(sender, entry.session)
        if this is None or not this.first:
            return []  # perhaps meant for the gateway on this same node
        if not 0 <= entry.sampled.token < self.vocab_size:
            why = f"token id {entry.sampled.token} is outside the vocabulary of {self.vocab_size}"
            return self.fail(entry.session, why, now, blame=sender)
        if this.position - (this.open.known_tokens - this.open.output_tokens) != entry.index:
            why = f"token {entry.index} came out of turn"
            return self.fail(entry.session, why, now, blame=sender)
        if entry.sampled.finish or this.position >= this.open.reserve_tokens:
            return []  # the gateway will close it
        return [Enqueue(self._row(this, this.position, 1, ids=(entry.sampled.token,)))]

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
            this.touched = now
            if this.closed:
                if this.computing == 0:
                    self._release(this)
                    freed = True
            elif not this.last:
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
        this: _Session, row: Row, choice: Sampled, tokens: dict[NodeId, list[TokenEntry]]
    ) -> None:
        """The gateway gets all of it; the first stage, when it is somebody else, just what it needs
        to go on.
        """
        prompt_tokens = this.open.known_tokens - this.open.output_tokens
        index = row.start + row.count - prompt_tokens
        tokens.setdefault(this.gateway, []).append(TokenEntry(this.open.session, index, choice))
        if this.open.next != this.gateway:
            bare = Sampled(choice.token, choice.finish)
            tokens.setdefault(this.open.next, []).append(TokenEntry(this.open.session, index, bare))

    # ---- ending

    def close(self, session: SessionId, sender: NodeId, now: float) -> list[Instruction]:
        this = self._sessions.get(session)
        if this is None or this.closed or sender != this.gateway:
            return []
        return self._end(this, now)

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
        return [told, *self._end(this, now)]

    def node_lost(self, node: NodeId, why: str, now: float) -> list[Instruction]:
        """A link went down. Sessions of a dead gateway end; a dead neighbour is reported to the
        gateway.
        """
        out: list[Instruction] = []
        for this in list(self._sessions.values()):
            if this.closed:
                continue
            if this.gateway == node:
                out += self._end(this, now)
            elif node in (this.open.next, this.open.previous):
                out += self.fail(this.open.session, why, now, blame=node)
        return out

    def _end(self, this: _Session, now: float) -> list[Instruction]:
        this.closed = True
        out: list[Instruction] = [Drop(this.open.session)]
        if this.computing == 0:
            self._release(this)
            out += self.admit(now)
        return out

    def _release(self, this: _Session) -> None:
        self._sessions.pop(this.open.session, None)
        if this.pages:
            self.pool.free(this.pages)
            this.pages = ()
