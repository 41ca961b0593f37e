"""The sessions of one stage: messages in, instructions out. No socket, no clock, no tensor
arithmetic.

A session here is a place in the ring: who may send us rows, whom we send ours, and the pages set
aside for it. Its life: Open -> (link to the next hop is made) -> (pages are set aside, at once or
after queueing) -> rows -> Close. Whoever runs this object carries out the instructions and tells it
which rows are being computed, so that the pages of a session that is closed in the middle of a
forward are given back only after it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ..engine.batcher import chunk_prompt
from ..engine.request import Sampled, Sampling
from ..engine.rows import Row
from ..errors import BadMessage, NoCapacity, Overloaded
from ..units import NodeId, SessionId
from .messages import Lost, Open, Opened, Refused, RowEntry, Step, TokenEntry, Tokens

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


@dataclass(slots=True)
class _Session:
    open: Open
    gateway: NodeId
    first: bool
    last: bool
    ids: tuple[int, ...]  # what the gateway gave us: prompt, then output so far
    state: Literal["connecting", "waiting", "running"] = "connecting"
    deadline: float = 0.0
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

    `first` and `last` say which ends of the model the stage holds. `make_sampler` is called for
    sessions of a last stage: handed in, so that this file needs no torch.
    """

    me: NodeId
    first: bool
    last: bool
    vocab_size: int
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
        self, message: Open, ids: tuple[int, ...], gateway: NodeId, now: float
    ) -> list[Instruction]:
        """A gateway wants a session here. Raises BadMessage where no honest gateway could have sent
        this.
        """
        known = self._sessions.get(message.session)
        if known is not None:
            raise BadMessage(f"session {message.session} is already open")
        self._check_open(message, ids)
        if len(self._sessions) >= self.config.max_sessions:
            return [
                self._refuse(
                    message, gateway, "busy", f"{self.config.max_sessions} sessions are open here"
                )
            ]
        patience = min(max(message.patience_s, 0.0), self.config.max_patience_s)
        self._sessions[message.session] = _Session(
            message, gateway, self.first, self.last, ids, deadline=now + patience
        )
        return [Connect(message.session, message.next)]

    def _check_open(self, message: Open, ids: tuple[int, ...]) -> None:
        if not 0 < message.known_tokens <= message.reserve_tokens:
            raise BadMessage("known_tokens must be within reserve_tokens")
        if not 0 <= message.output_tokens <= message.known_tokens:
            raise BadMessage("output_tokens must be within known_tokens")
        if self.first and len(ids) != message.known_tokens:
            raise BadMessage(
                f"the first stage needs {message.known_tokens} token ids, got {len(ids)}"
            )
        if len(ids) not in (0, message.output_tokens, message.known_tokens):
            raise BadMessage("token ids must be all known ones, the output's, or none")
        if ids and max(ids) >= self.vocab_size:
            raise BadMessage(f"token id {max(ids)} is outside the vocabulary of {self.vocab_size}")
        if self.last and message.sampling is None:
            raise BadMessage("the last stage needs the sampling settings")

    def connected(self, session: SessionId, now: float) -> list[Instruction]:
        """The link to the next hop stands."""
        this = self._sessions.get(session)
        if this is None or this.state != "connecting":
            return []
        this.state = "waiting"
        return self.admit(now)

    def unreachable(self, session: SessionId, why: str) -> list[Instruction]:
        this = self._sessions.pop(session, None)
        if this is None:
            return []
        message = f"cannot reach the next stage {this.open.next}: {why}"
        return [self._refuse(this.open, this.gateway, "unreachable", message)]

    def admit(self, now: float) -> list[Instruction]:
        """Give pages to the sessions that wait, first come first served. Call it again at
        `next_deadline`.
        """
        out: list[Instruction] = []
        blocked = False  # one that waits for more room is not overtaken by smaller ones
        for this in [each for each in self._sessions.values() if each.state == "waiting"]:
            try:
                if blocked:
                    raise Overloaded("others wait for pages already")
                this.pages = self.pool.allocate(this.open.reserve_tokens)
            except Overloaded as full:
                blocked = True
                if now >= this.deadline or self.waiting > self.config.max_waiting:
                    out.append(self._give_up(this, "busy", full.message))
            except NoCapacity as never:
                out.append(self._give_up(this, "never", never.message))
            else:
                out += self._start(this)
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
        reason: Literal["busy", "never", "unreachable"],
        why: str,
    ) -> Send:
        return Send(gateway, Refused(message.session, reason, why))

    def _start(self, this: _Session) -> list[Instruction]:
        this.state = "running"
        if this.last and this.open.sampling is not None:
            prompt, output = self._split_ids(this)
            this.sampler = self.make_sampler(this.open.sampling, prompt, output)
        out: list[Instruction] = [Send(this.gateway, Opened(this.open.session))]
        if this.first:
            for start, chunk in chunk_prompt(this.ids, self.config.chunk_tokens):
                out.append(Enqueue(self._row(this, start, len(chunk), ids=chunk)))
        return out

    @staticmethod
    def _split_ids(this: _Session) -> tuple[tuple[int, ...], tuple[int, ...]]:
        prompt_tokens = len(this.ids) - this.open.output_tokens
        return this.ids[:prompt_tokens], this.ids[prompt_tokens:]

    # ---- running

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

    def receive(self, entry: RowEntry, hidden: Tensor, sender: NodeId) -> list[Instruction]:
        """Rows from the stage before us. Raises BadMessage when they do not fit the session."""
        this = self._sessions.get(entry.session)
        if this is None or this.closed or this.state != "running":
            return []  # closed while the frame was under way
        if this.first or sender != this.open.previous:
            raise BadMessage(f"{sender} is not the stage before us in session {entry.session}")
        if entry.start != this.position or entry.count < 1:
            raise BadMessage(
                f"expected position {this.position} of session {entry.session}, got {entry.start}"
            )
        if entry.start + entry.count > this.open.reserve_tokens:
            raise BadMessage(
                f"session {entry.session} outgrew the {this.open.reserve_tokens} tokens it reserved"
            )
        return [Enqueue(self._row(this, entry.start, entry.count, hidden=hidden))]

    def token(self, entry: TokenEntry, sender: NodeId) -> list[Instruction]:
        """The last stage chose a token: the first stage computes it next."""
        this = self._sessions.get(entry.session)
        if this is None or this.closed or this.state != "running" or not this.first:
            return []  # closed meanwhile, or meant for the gateway on this same node
        if sender != this.open.previous:
            raise BadMessage(f"{sender} is not the last stage of session {entry.session}")
        if not 0 <= entry.sampled.token < self.vocab_size:
            raise BadMessage(
                f"token id {entry.sampled.token} is outside the vocabulary of {self.vocab_size}"
            )
        if this.position - (this.open.known_tokens - this.open.output_tokens) != entry.index:
            raise BadMessage(f"token {entry.index} of session {entry.session} came out of turn")
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
        if this is None or this.closed:
            return []
        if sender != this.gateway:
            raise BadMessage(f"{sender} is not the gateway of session {session}")
        return self._end(this, now)

    def fail(
        self, session: SessionId, why: str, now: float, blame: NodeId | None = None
    ) -> list[Instruction]:
        """We cannot go on: tell the gateway, which will look for another route."""
        this = self._sessions.get(session)
        if this is None or this.closed:
            return []
        told = Send(this.gateway, Lost(session, blame or self.me, why))
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
