"""Runs a whole-model stage behind which another engine computes (`--backend URL`).

It has the surface of a `StageWorker`. Each session is one HTTP stream; closing the stream frees
the engine. A failing stream is told to its gateway, which goes on elsewhere with the ids so far.
While the engine does not answer, the stage takes no sessions and says so; it comes back by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import aclosing
from typing import TYPE_CHECKING

from ..engine.served import Engine, Job
from ..errors import BackendFailed, BadConfig, LinkClosed, Overloaded
from ..transport import Bytes, Links
from ..units import NodeId, SessionId
from .fronted_sessions import FrontedInstruction, FrontedSessions, Halt, Say, Start
from .messages import Message, Open, Step, TokenEntry, split_open, to_frame

if TYPE_CHECKING:
    from .stage_key import StageKey

CHECK_S = 5.0  # between two looks at an engine that is well
SOON_S, LATE_S = 0.5, 30.0  # first and longest wait before the next look at one that is not


def next_wait(wait_s: float) -> float:
    """Twice as long each time, up to LATE_S."""
    return min(LATE_S, max(SOON_S, 2 * wait_s))


class FrontedWorker:
    """`run` it in a task group; hand it the messages that concern it. `changed` is called with
    False when the engine stops answering, with True when it answers again.
    """

    def __init__(
        self,
        key: StageKey,
        sessions: FrontedSessions,
        engine: Engine,
        *,
        links: Links,
        clock: Callable[[], float],
        changed: Callable[[bool], None],
        check_s: float = CHECK_S,
    ) -> None:
        self.key, self.sessions = key, sessions
        self._engine, self._links, self._clock, self._changed = engine, links, clock, changed
        self._check_s = check_s
        self._tasks: asyncio.TaskGroup | None = None
        self._streams: dict[SessionId, asyncio.Task[None]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._doubt = asyncio.Event()  # a stream broke: look at once
        self._leaving = False
        self.answers = True  # the engine does
        self.idle = asyncio.Event()  # no session is here
        self.idle.set()

    @property
    def backend(self) -> str:
        """Which server, and how it is spoken to."""
        return self._engine.name

    @property
    def draining(self) -> bool:
        """No session is taken."""
        return self._leaving or not self.answers

    @draining.setter
    def draining(self, leaving: bool) -> None:
        self._leaving = leaving

    # ---- messages in

    def open(self, message: Open, body: Bytes, sender: NodeId) -> None:
        _, ids = split_open(message, body)
        self._do(self.sessions.open(message, ids, sender, self._clock()))

    def step(self, message: Step, body: Bytes, sender: NodeId) -> None:
        """Hidden states are for stages that compute them."""

    def token(self, entry: TokenEntry, sender: NodeId) -> None:
        """The engine goes on by itself."""

    def close(self, session: SessionId, sender: NodeId, digests: Bytes = b"") -> None:
        self._do(self.sessions.close(session, sender, self._clock()))

    def node_lost(self, node: NodeId, why: str) -> None:
        self._do(self.sessions.node_lost(node, self._clock()))

    def shut_down(self) -> None:
        """Tell every gateway that its session cannot go on here."""
        for session in self.sessions.ids():
            self._fail(session, "the stage was taken out of service")

    # ---- instructions out

    def _do(self, instructions: Iterable[FrontedInstruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Say(node, message):
                    self._say(node, message)
                case Start(session, job):
                    self._start(session, job)
                case Halt(session):
                    self._halt(session)
        (self.idle.clear if self.sessions else self.idle.set)()
        self._arm_timer()

    def _say(self, node: NodeId, message: Message) -> None:
        """A gateway that cannot be told anything is gone; not in the middle of the instructions."""
        try:
            self._links.send(node, to_frame(message))
        except (LinkClosed, Overloaded) as error:
            asyncio.get_running_loop().call_soon(self.node_lost, node, error.message)

    def _start(self, session: SessionId, job: Job) -> None:
        if self._tasks is not None:
            self._streams[session] = self._tasks.create_task(self._stream(session, job))

    def _halt(self, session: SessionId) -> None:
        """The stream's own task ends by itself."""
        task = self._streams.pop(session, None)
        if task is not None and task is not asyncio.current_task():
            task.cancel()

    def _fail(self, session: SessionId, why: str) -> None:
        self._do(self.sessions.fail(session, why, self._clock()))

    def _arm_timer(self) -> None:
        """Wake when the next queued session runs out of patience."""
        deadline = self.sessions.next_deadline()
        if deadline is None or self._timer is not None:
            return
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(max(0.0, deadline - self._clock()), self._patience_over)

    def _patience_over(self) -> None:
        self._timer = None
        self._do(self.sessions.admit(self._clock()))

    # ---- the engine

    async def _stream(self, session: SessionId, job: Job) -> None:
        try:
            async with aclosing(self._engine.generate(job)) as pieces:
                async for tokens in pieces:
                    self._do(self.sessions.tokens(session, tokens, self._clock()))
        except BackendFailed as error:
            self._doubt.set()
            self._fail(session, error.message)

    async def run(self) -> None:
        """Look after the engine, and let streams run, until cancelled."""
        try:
            async with asyncio.TaskGroup() as self._tasks:
                await self._look_after()
        finally:
            self._tasks = None
            if self._timer is not None:
                self._timer.cancel()

    async def _look_after(self) -> None:
        wait_s = self._check_s
        while True:
            await self._wait(wait_s)
            answers = await self._answers()
            wait_s = self._check_s if answers else next_wait(0.0 if self.answers else wait_s)
            if answers != self.answers:
                self.answers = answers
                self._changed(answers)

    async def _wait(self, wait_s: float) -> None:
        """A broken stream calls at once, as long as the engine is believed to be well."""
        self._doubt.clear()
        try:
            async with asyncio.timeout(wait_s):
                await (self._doubt.wait() if self.answers else asyncio.Event().wait())
        except TimeoutError:
            return

    async def _answers(self) -> bool:
        """One that comes back may be another version: it is asked everything anew."""
        try:
            await (self._engine.alive() if self.answers else self._engine.probe())
        except (BackendFailed, BadConfig):
            return False
        return True
