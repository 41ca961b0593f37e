"""The pipeline of one node: hands each message to the stage or the gateway that it concerns."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from typing import Self

from ..errors import LinkClosed, Overloaded
from ..events import Emit
from ..transport import Bytes, Frame, Links
from ..units import NodeId, SessionId
from .fronted import FrontedWorker
from .gateway import Gateway, OnLoad
from .messages import (
    CHANNEL,
    Close,
    Go,
    Leaving,
    Lost,
    Open,
    Opened,
    Preempted,
    Refused,
    Resume,
    Step,
    TokenEntry,
    Tokens,
    from_frame,
    to_frame,
)
from .plans import GenerationConfig, Planner
from .stage_key import StageKey
from .worker import StageWorker

Worker = StageWorker | FrontedWorker


class Pipeline:
    """Owns the tasks of its workers; `async with` it. Frames on the pipeline's channel are its
    food.
    """

    def __init__(
        self,
        links: Links,
        planner: Planner,
        *,
        emit: Emit,
        clock: Callable[[], float],
        config: GenerationConfig | None = None,
        wall_clock: Callable[[], float] = time.time,
        draw: Callable[[int], bytes] = secrets.token_bytes,
        on_load: OnLoad = lambda node, model, load: None,
    ) -> None:
        self._links = links
        self._tasks = asyncio.TaskGroup()
        self._workers: dict[StageKey, tuple[Worker, asyncio.Task[None]]] = {}
        self.gateway = Gateway(
            links,
            planner,
            emit=emit,
            clock=clock,
            config=config,
            wall_clock=wall_clock,
            draw=draw,
            on_load=on_load,
        )

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        self._links.on(CHANNEL, self.receive)
        self._links.on_lost(self.node_lost)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for _, task in self._workers.values():
            task.cancel()
        await self._tasks.__aexit__(None, None, None)

    # ---- stages of this node

    @property
    def workers(self) -> list[Worker]:
        return [worker for worker, _ in self._workers.values()]

    def serve(self, worker: Worker) -> None:
        self._workers[worker.key] = (worker, self._tasks.create_task(worker.run()))

    def stop(self, key: StageKey) -> None:
        """Take a stage out of service; its sessions end and their gateways look elsewhere."""
        worker, task = self._workers.pop(key)
        worker.shut_down()
        task.cancel()

    async def idle(self) -> None:
        """Back once no stage here has a session, and no client of our gateway waits."""
        for worker in self.workers:
            await worker.idle.wait()
        await self.gateway.idle.wait()

    # ---- messages

    def receive(self, sender: NodeId, frame: Frame) -> None:
        """Raises PeerError for what an honest peer would not send: the transport drops the peer
        and counts it.
        """
        message = from_frame(frame)
        match message:
            case Step():
                for worker in self.workers:
                    worker.step(message, frame.body, sender)
            case Tokens(entries):
                for entry in entries:
                    self._token(entry, sender)
            case Open() | Resume() | Go() | Close():
                self._told(message, frame.body, sender)
            case _:
                self._answer(message, sender)

    def _told(self, message: Open | Resume | Go | Close, body: Bytes, sender: NodeId) -> None:
        """What gateways tell stages."""
        match message:
            case Open():
                self._open(message, body, sender)
            case Resume():
                self._resume(message, body, sender)
            case Go():
                for worker in self._stages():
                    worker.go(message, sender)
            case Close(session):
                for each in self.workers:
                    each.close(session, sender, body)

    def _answer(
        self, message: Opened | Refused | Preempted | Lost | Leaving, sender: NodeId
    ) -> None:
        """What stages tell the gateway."""
        match message:
            case Opened():
                self.gateway.opened(message, sender)
            case Refused():
                self.gateway.refused(message, sender)
            case Preempted():
                self.gateway.preempted(message, sender)
            case Lost():
                self.gateway.stage_lost(message, sender)
            case Leaving():
                self.gateway.leaving(message, sender)

    def _token(self, entry: TokenEntry, sender: NodeId) -> None:
        """The first stage goes on before the reader is served."""
        for worker in self.workers:
            worker.token(entry, sender)
        self.gateway.token(entry, sender)

    def _open(self, message: Open, body: Bytes, sender: NodeId) -> None:
        """A session has one place on a node."""
        serving = self._serving(message)
        elsewhere = any(
            message.session in each.sessions for each in self.workers if each != serving
        )
        hung = isinstance(serving, StageWorker) and serving.hung
        if serving is not None and not serving.draining and not elsewhere and not hung:
            serving.open(message, body, sender)
            return
        why = f"layers {message.layers} are not served here (any more)"
        self._refuse(message.session, why, sender)

    def _serving(self, message: Open) -> Worker | None:
        """The stage of just these layers, or one that can run a part."""
        key = StageKey(message.model, message.compute, message.layers)
        if key in self._workers:
            return self._workers[key][0]
        fits = [each for each in self._stages() if each.runs(key)]
        return fits[0] if fits else None

    def _stages(self) -> list[StageWorker]:
        return [each for each in self.workers if isinstance(each, StageWorker)]

    def _resume(self, message: Resume, body: Bytes, sender: NodeId) -> None:
        taken = any(message.renamed in each.sessions for each in self.workers)
        for worker in self._stages():
            if message.session in worker.sessions and not taken:
                worker.resume(message, body, sender)
                return
        self._refuse(message.renamed, "the session is not here (any more)", sender)

    def _refuse(self, session: SessionId, why: str, gateway: NodeId) -> None:
        try:
            self._links.send(gateway, to_frame(Refused(session, "gone", why)))
        except (LinkClosed, Overloaded):
            return  # nobody is left to be told

    def hand_over(self) -> None:
        """Ask the gateways of all sessions here to move them to other nodes. They are served until
        they have gone; wait for `idle`, or stop.
        """
        for worker in self._stages():
            worker.hand_over()

    def node_lost(self, node: NodeId, why: str) -> None:
        for worker in self.workers:
            worker.node_lost(node, why)
        self.gateway.node_lost(node, why)
