"""Runs one stage: carries frames to its sessions, rows to the engine thread, and results to the
next hop.

The loop is the whole story: take what is ready, one ragged forward, send the results. Prompts
whose next hop does not keep up are left out until it does; all else goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from ..engine.batcher import Batcher
from ..engine.pace import SpeedMeter, Work
from ..engine.rows import Row
from ..errors import LinkClosed, LocalError, Overloaded
from ..events import DraftsVerified, Emit, PagesChanged, StepDone
from ..hardware import Speed
from ..transport import Bytes, Links
from ..units import ModelId, NodeId, SessionId, Slice
from .messages import (
    Go,
    Message,
    Open,
    Resume,
    RowEntry,
    Step,
    TokenEntry,
    Tokens,
    split_open,
    to_frame,
    unpack_digests,
    unpack_ids,
)
from .stage import Connect, Drop, Enqueue, Forward, Instruction, Note, Replay, Send, StageSessions
from .watch import Watch

if TYPE_CHECKING:
    from ..engine.draft import Drafter, Wish
    from ..engine.stage import Stage, StepResult
    from ..engine.thread import EngineThread


WHOLE = ("gguf", "served")  # computed by others' engines, which run all of a slice
HUNG_S, HUNG_TIMES = 5.0, 20.0  # a forward that takes longer, and so many times its usual time
CONGESTED_S = 120.0  # a next hop that takes nothing for so long is lost; gateways gave up before


@dataclass(frozen=True, slots=True)
class StageKey:
    """What must agree between a gateway's plan and a stage."""

    model: ModelId
    compute: str
    layers: Slice


class StageWorker:
    """One slice in service on this node. `run` it in a task group; hand it the messages that
    concern it.
    """

    def __init__(
        self,
        key: StageKey,
        sessions: StageSessions,
        stage: Stage,
        *,
        thread: EngineThread,
        links: Links,
        emit: Emit,
        clock: Callable[[], float],
        batcher: Batcher | None = None,
    ) -> None:
        self.key, self.sessions = key, sessions
        self._stage, self._thread, self._links = stage, thread, links
        self._emit, self._clock = emit, clock
        if batcher is None:  # an empty one is false
            batcher = Batcher(meter=SpeedMeter(len(key.layers)))
        self._batcher = batcher
        self._drafter: Drafter | None = None
        self._forgotten: list[SessionId] = []  # by us, not yet by the drafter
        self._ended: list[SessionId] = []  # here, not yet in the engine
        self._ready = asyncio.Event()
        self._tasks: asyncio.TaskGroup | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._alarm = 0.0  # when it rings
        self._idle_timer: asyncio.TimerHandle | None = None
        self._congested: set[NodeId] = set()  # next hops with too much on the way to them
        self.draining = False
        self.hung = False  # a forward does not come back: no session can go on or begin here
        self.idle = asyncio.Event()  # no session is here
        self.idle.set()

    @property
    def speed(self) -> Speed:
        """As far as the steps so far tell."""
        return self._batcher.speed

    def guess_with(self, drafter: Drafter) -> None:
        """For the sessions of a first stage, from now on."""
        self._drafter = drafter

    # ---- messages in

    def open(self, message: Open, body: Bytes, sender: NodeId) -> None:
        digests, ids = split_open(message, body)
        self._do(self.sessions.open(message, ids, sender, self._clock(), digests))

    def resume(self, message: Resume, body: Bytes, sender: NodeId) -> None:
        self._do(self.sessions.resume(message, unpack_ids(body), sender, self._clock()))

    def go(self, message: Go, sender: NodeId) -> None:
        self._do(self.sessions.go(message, sender, self._clock()))

    def step(self, message: Step, body: Bytes, sender: NodeId) -> None:
        if not any(row.session in self.sessions for row in message.rows):
            return
        view = memoryview(body).cast("B")
        total = sum(row.count for row in message.rows)
        if len(view) != total * self._row_bytes:
            why = f"{len(view)} bytes of hidden states for {total} tokens of {self._row_bytes} each"
            self._unreadable(message.rows, sender, why)
            return
        at = 0
        for row in message.rows:
            stop = at + row.count * self._row_bytes
            part = view[at:stop]
            self._receive(row, _own(part) if 2 * len(part) < len(view) else part, sender)
            at = stop

    @cached_property
    def _row_bytes(self) -> int:
        model = self._stage.model
        return model.hidden_size * model.dtype.itemsize

    def _receive(self, row: RowEntry, hidden: memoryview, sender: NodeId) -> None:
        """`hidden` waits for its forward and keeps no more of a frame in memory than its own."""
        self._do(self.sessions.receive(row, hidden, sender, self._clock()))

    def _unreadable(self, rows: Iterable[RowEntry], sender: NodeId, why: str) -> None:
        for row in rows:
            self._do(self.sessions.unreadable(row.session, sender, why, self._clock()))

    def token(self, entry: TokenEntry, sender: NodeId) -> None:
        self._do(self.sessions.token(entry, sender, self._clock()))

    def close(self, session: SessionId, sender: NodeId, digests: Bytes = b"") -> None:
        known = unpack_digests(digests)
        self._do(self.sessions.close(session, sender, self._clock(), known))

    def node_lost(self, node: NodeId, why: str) -> None:
        self._do(self.sessions.node_lost(node, why, self._clock()))

    def shut_down(self) -> None:
        """Tell every gateway that its session cannot go on here."""
        now = self._clock()
        for session in self.sessions.ids():
            self._do(self.sessions.fail(session, "the stage was taken out of service", now))

    def runs(self, key: StageKey) -> bool:
        """Whether a session can have its part of these layers here."""
        fits = (key.model, key.compute) == (self.key.model, self.key.compute)
        return fits and key.compute not in WHOLE and key.layers.within(self.key.layers)

    def hand_over(self) -> None:
        self._do(self.sessions.leave())

    # ---- instructions out

    def _do(self, instructions: Iterable[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Enqueue(row):
                    self._batcher.add(row)
                    self._ready.set()
                case Send(node, message):
                    self._send(node, message)
                case Connect(session, node):
                    self._spawn_connect(session, node)
                case Drop(session):
                    self._batcher.drop(session)
                    self._forgotten += [session] if self._drafter is not None else []
                    self._ended += [session] if self._stage.keeps_states else []
                case Replay():
                    self._replay(instruction)
                case Note(event):
                    self._emit(event)
                case Forward():
                    raise AssertionError("forwards come from finish(), which _dispatch handles")
        (self.idle.clear if self.sessions else self.idle.set)()
        self._arm_timer()
        self._arm_idle_timer()

    def _send(
        self, node: NodeId, message: Message, body: Bytes = b"", *, bulk: bool = False
    ) -> None:
        """A message that cannot be sent needs no answer here: the lost link ends its sessions,
        after the instructions at hand are done, never in the middle of them.
        """
        try:
            self._links.send(node, to_frame(message, body, bulk=bulk))
        except (LinkClosed, Overloaded) as error:
            asyncio.get_running_loop().call_soon(self.node_lost, node, error.message)

    def _spawn_connect(self, session: SessionId, node: NodeId) -> None:
        if self._links.is_connected(node):  # the usual case: no task, no turn of the loop
            self._do(self.sessions.connected(session, self._clock()))
        elif self._tasks is not None:
            self._tasks.create_task(self._connect(session, node))

    async def _connect(self, session: SessionId, node: NodeId) -> None:
        try:
            await self._links.connect(node)
        except LocalError as error:
            self._do(self.sessions.unreachable(session, error.message))
        else:
            self._do(self.sessions.connected(session, self._clock()))

    def _arm_timer(self) -> None:
        """Wake when the next queued session runs out of patience."""
        deadline = self.sessions.next_deadline()
        if deadline is None or (self._timer is not None and self._alarm <= deadline):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._alarm, loop = deadline, asyncio.get_running_loop()
        self._timer = loop.call_later(max(0.0, deadline - self._clock()), self._patience_over)

    def _patience_over(self) -> None:
        self._timer = None
        self._do(self.sessions.admit(self._clock()))

    def _arm_idle_timer(self) -> None:
        if self._idle_timer is None and self.sessions:
            loop = asyncio.get_running_loop()
            self._idle_timer = loop.call_later(self.sessions.config.idle_s / 4, self._end_idle)

    def _end_idle(self) -> None:
        self._idle_timer = None
        self._do(self.sessions.end_idle(self._clock()))

    # ---- the loop

    async def run(self) -> None:
        try:
            async with asyncio.TaskGroup() as self._tasks:
                while True:
                    rows = self._batcher.take(self.sessions.prompting(self._congested))
                    if not rows:
                        self._ready.clear()
                        await self._ready.wait()
                        continue
                    await self._step(rows)
        finally:  # a timer would keep us, and the weights with us
            for timer in (self._timer, self._idle_timer):
                if timer is not None:
                    timer.cancel()

    async def _step(self, rows: Sequence[Row]) -> None:
        """Rows on which the engine fails are tried again one by one: only whose row it is pays."""
        self.sessions.begin(rows)
        rows = await self._guess(rows)
        positions = [row.sampler.position if row.sampler else 0 for row in rows]
        ended, self._ended = self._ended, []  # those that end from now on may be among the rows
        result = await self._compute(rows, ended)
        if not isinstance(result, Exception):
            await self._dispatch(rows, result)
            return
        for row, position in zip(rows, positions, strict=True):
            chosen = row.sampler is not None and row.sampler.position != position
            again = result if len(rows) == 1 or chosen else await self._compute([row])
            if isinstance(again, Exception):
                why = f"the engine failed: {again}"
                self._do(self.sessions.failed(row, why, self._clock()))
            else:
                await self._dispatch([row], again)

    async def _guess(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Add drafts where there is room; a drafter that fails adds none."""
        wishes = self.sessions.guesses.wishes(rows) if self._drafter is not None else {}
        if self._drafter is None or not wishes:
            return rows
        over, self._forgotten = self._forgotten, []
        asked = list(wishes.values())
        try:
            if self._drafter.is_quick(asked):
                drafts = _draft(self._drafter, asked, over)
            else:
                drafts = await self._thread.run(_draft, self._drafter, asked, over)
        except (RuntimeError, ValueError, IndexError):
            return rows
        return self.sessions.guesses.added(rows, dict(zip(wishes, drafts, strict=True)))

    async def _compute(
        self, rows: Sequence[Row], ended: Iterable[SessionId] = ()
    ) -> StepResult | Exception:
        """Whatever the engine raises is a result here: it says something about these rows."""
        started = self._clock()
        watch = Watch(self._hung_after_s(rows), self._hangs)
        try:
            (result,) = await asyncio.gather(
                self._thread.run(_forward, self._stage, rows, ended, watch), return_exceptions=True
            )
        finally:
            watch.cancel()
            self.hung = False
        if not isinstance(result, BaseException):
            took = self._clock() - started
            self._batcher.observe(rows, took)
            self._emit(StepDone(self.key.model, len(rows), sum(row.count for row in rows), took))
            return result
        if not isinstance(result, Exception):
            raise result
        return result

    def _hung_after_s(self, rows: Sequence[Row]) -> float:
        work = Work.of(rows)
        usual = self.speed.seconds(len(self.key.layers), work.tokens, work.context, work.sampled)
        return max(HUNG_S, HUNG_TIMES * usual)

    def _hangs(self) -> None:
        """The engine hangs while we still beat: nobody else can tell."""
        self.hung = True
        for session in self.sessions.ids():
            why = "a step does not come back from the engine"
            self._do(self.sessions.fail(session, why, self._clock()))

    async def _dispatch(self, rows: Sequence[Row], result: StepResult) -> None:
        """Hidden states that the thread has to put together go last: whoever closes a session while
        we wait for them must find all else done.
        """
        out = self.sessions.finish(rows, result.sampled, self._clock())
        self._count_drafts(rows, result)
        forwards: list[Forward] = []
        rest: list[Instruction] = []
        for instruction in out:
            if isinstance(instruction, Forward) and len(instruction.rows) == len(rows):
                self._forward(
                    instruction, self._stage.hidden_to_wire(result, rows, instruction.rows)
                )
            elif isinstance(instruction, Forward):
                forwards.append(instruction)
            elif isinstance(instruction, Send) and isinstance(instruction.message, Tokens):
                self._send(instruction.node, instruction.message)
            else:
                rest.append(instruction)
        self._do(rest)
        self._emit(PagesChanged(self.key.model, self.sessions.pool.used_fraction))
        for each in forwards:
            wire = self._stage.hidden_to_wire
            self._forward(each, await self._thread.run(wire, result, rows, each.rows))

    def _forward(self, forward: Forward, hidden: memoryview) -> None:
        if forward.node is not None:
            self._send(forward.node, forward.message, hidden, bulk=forward.bulk)
            if forward.node not in self._congested:
                self._wait_for(forward.node)
        self._do(self.sessions.keep(forward.message, hidden))

    def _replay(self, replay: Replay) -> None:
        """Chunk by chunk, as the next hop takes them."""
        self._send(replay.node, replay.message, replay.hidden, bulk=True)
        if self._tasks is not None:
            self._tasks.create_task(self._replay_on(replay))

    async def _replay_on(self, replay: Replay) -> None:
        try:
            async with asyncio.timeout(CONGESTED_S):
                await self._links.drain(replay.node)
        except (LinkClosed, TimeoutError):
            return  # the lost link suspends the session, silence ends it
        self._do(self.sessions.replay_on(replay.session, self._clock()))

    def _count_drafts(self, rows: Sequence[Row], result: StepResult) -> None:
        checked = [
            (len(row.draft), len(chosen) - 1)
            for row, chosen in zip(rows, result.sampled, strict=True)
            if row.draft and chosen
        ]
        if checked:
            drafted, accepted = map(sum, zip(*checked, strict=True))
            self._emit(DraftsVerified(self.key.model, drafted, accepted))

    def _wait_for(self, node: NodeId) -> None:
        """Prompts for it rest until what was sent to it is on its way."""
        if self._tasks is not None:
            self._congested.add(node)
            self._tasks.create_task(self._drain(node))

    async def _drain(self, node: NodeId) -> None:
        try:
            async with asyncio.timeout(CONGESTED_S):
                await self._links.drain(node)
        except LinkClosed as error:
            self.node_lost(node, error.message)
        except TimeoutError:
            self._links.drop(node, "it does not take what is sent to it")
        self._congested.discard(node)
        self._ready.set()


def _draft(
    drafter: Drafter, wishes: Sequence[Wish], over: Iterable[SessionId]
) -> list[tuple[int, ...]]:
    """After whatever was drafted for sessions that are over."""
    for session in over:
        drafter.forget(session)
    return drafter.draft(wishes)


def _own(part: memoryview) -> memoryview:
    return memoryview(bytearray(part))


def _forward(
    stage: Stage, rows: Sequence[Row], ended: Iterable[SessionId], watch: Watch
) -> StepResult:
    """In the engine thread: what came over the wire becomes tensors there."""
    watch.begun = True
    for session in ended:
        stage.forget(session)
    return stage.step([_with_hidden(stage, row) for row in rows])


def _with_hidden(stage: Stage, row: Row) -> Row:
    if row.wire is None:
        return row
    return replace(row, hidden=stage.hidden_from_wire(row.wire, row.count), wire=None)
