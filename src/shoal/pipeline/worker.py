"""Runs one stage: carries frames to its sessions, rows to the engine (`computing.py`), and results
to the next hop (`outbox.py`).

The loop is the whole story: take what is ready, one ragged forward, send the results. Prompts
whose next hop does not keep up are left out until it does; all else goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING

from ..engine.batcher import Batcher
from ..engine.pace import SpeedMeter
from ..engine.rows import Row
from ..events import DraftsVerified, Emit, PagesChanged, StepDone
from ..hardware import Speed
from ..transport import Bytes, Links
from ..units import NodeId, SessionId
from .computing import Computing, checked_drafts
from .messages import (
    Go,
    Open,
    Resume,
    RowEntry,
    Step,
    TokenEntry,
    Tokens,
    split_open,
    unpack_digests,
    unpack_ids,
)
from .outbox import Outbox
from .stage import Connect, Drop, Enqueue, Forward, Instruction, Note, Replay, Send, StageSessions
from .stage_key import StageKey

if TYPE_CHECKING:
    from ..engine.draft import Drafter
    from ..engine.stage import Stage, StepResult
    from ..engine.thread import EngineThread


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
        self._stage = stage
        self._emit, self._clock = emit, clock
        if batcher is None:  # an empty one is false
            batcher = Batcher(meter=SpeedMeter(len(key.layers)))
        self._batcher = batcher
        self._computing = Computing(stage, len(key.layers), thread, batcher, clock)
        self._ready = asyncio.Event()
        self._outbox = Outbox(links, self.node_lost, self._ready.set)
        self._timer: asyncio.TimerHandle | None = None
        self._alarm = 0.0  # when it rings
        self._idle_timer: asyncio.TimerHandle | None = None
        self.draining = False
        self.idle = asyncio.Event()  # no session is here
        self.idle.set()

    @property
    def speed(self) -> Speed:
        """As far as the steps so far tell."""
        return self._batcher.speed

    @property
    def hung(self) -> bool:
        """A forward does not come back: no session can go on or begin here."""
        return self._computing.hung

    def guess_with(self, drafter: Drafter) -> None:
        """For the sessions of a first stage, from now on."""
        self._computing.drafter = drafter

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
            if 2 * len(part) < len(view):  # it waits, and keeps no more in memory than its own
                part = memoryview(bytearray(part))
            self._do(self.sessions.receive(row, part, sender, self._clock()))
            at = stop

    @cached_property
    def _row_bytes(self) -> int:
        model = self._stage.model
        return model.hidden_size * model.dtype.itemsize

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
        return self.key.runs(key)

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
                    self._outbox.send(node, message)
                case Connect(session, node):
                    made, failed = partial(self._connected, session), partial(self._apart, session)
                    self._outbox.connect(node, made, failed)
                case Drop(session):
                    self._batcher.drop(session)
                    self._computing.forget(session)
                case Replay(session):
                    self._outbox.replay(instruction, partial(self._replay_on, session))
                case Note(event):
                    self._emit(event)
                case Forward():
                    raise AssertionError("forwards come from finish(), which _dispatch handles")
        (self.idle.clear if self.sessions else self.idle.set)()
        self._arm_timer()
        self._arm_idle_timer()

    def _connected(self, session: SessionId) -> None:
        self._do(self.sessions.connected(session, self._clock()))

    def _apart(self, session: SessionId, why: str) -> None:
        self._do(self.sessions.unreachable(session, why))

    def _replay_on(self, session: SessionId) -> None:
        self._do(self.sessions.replay_on(session, self._clock()))

    def _give_sessions_back(self) -> None:
        """The engine hangs while we still beat: nobody else can tell."""
        for session in self.sessions.ids():
            why = "a step does not come back from the engine"
            self._do(self.sessions.fail(session, why, self._clock()))

    # ---- timers

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
            async with asyncio.TaskGroup() as self._outbox.tasks:
                while True:
                    rows = self._batcher.take(self.sessions.prompting(self._outbox.congested))
                    if not rows:
                        self._ready.clear()
                        await self._ready.wait()
                        continue
                    await self._step(rows)
        finally:  # these would keep us, and the weights with us
            self._outbox.close()
            for timer in (self._timer, self._idle_timer):
                if timer is not None:
                    timer.cancel()

    async def _step(self, rows: Sequence[Row]) -> None:
        """Rows on which the engine fails are tried again one by one: only whose row it is pays."""
        self.sessions.begin(rows)
        rows = await self._computing.guess(rows, self.sessions.guesses)
        positions = [row.sampler.position if row.sampler else 0 for row in rows]
        result = await self._compute(rows, self._computing.take_ended())
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

    async def _compute(
        self, rows: Sequence[Row], ended: Iterable[SessionId] = ()
    ) -> StepResult | Exception:
        done = await self._computing.compute(rows, ended, self._give_sessions_back)
        if isinstance(done, Exception):
            return done
        result, took = done
        self._emit(StepDone(self.key.model, len(rows), sum(row.count for row in rows), took))
        return result

    async def _dispatch(self, rows: Sequence[Row], result: StepResult) -> None:
        """Hidden states that the thread has to put together go last: whoever closes a session while
        we wait for them must find all else done.
        """
        out = self.sessions.finish(rows, result.sampled, self._clock())
        if checked := checked_drafts(rows, result.sampled):
            self._emit(DraftsVerified(self.key.model, *checked))
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
                self._outbox.send(instruction.node, instruction.message)
            else:
                rest.append(instruction)
        self._do(rest)
        self._emit(PagesChanged(self.key.model, self.sessions.pool.used_fraction))
        for each in forwards:
            self._forward(each, await self._computing.to_wire(result, rows, each.rows))

    def _forward(self, forward: Forward, hidden: memoryview) -> None:
        if forward.node is not None:
            self._outbox.forward(forward.node, forward, hidden)
        self._do(self.sessions.keep(forward.message, hidden))
