"""One node's pipeline with real stages of the built-in model, and links that only write down what
is sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import cache
from typing import Any, cast

from shoal.engine.draft import NgramDrafter
from shoal.engine.prefix import PrefixPool
from shoal.engine.sampling import SamplerState
from shoal.engine.stage import Stage, StageConfig
from shoal.engine.thread import EngineThread
from shoal.errors import LinkClosed, NoRoute, Overloaded
from shoal.events import ignore
from shoal.identity import Identity
from shoal.models.checkpoint import open_checkpoint
from shoal.models.slice import load_slice
from shoal.pipeline import Pipeline, Plan, StageKey, StageWorker, Wish
from shoal.pipeline.messages import Message, from_frame, to_frame
from shoal.pipeline.stage import StageSessions, StageSessionsConfig
from shoal.transport import Frame, Links
from shoal.units import NodeId, Slice

ME, MALLORY, ALICE, BOB = (Identity.from_secret(bytes([n]) * 32).node for n in (1, 2, 3, 4))
WHOLE, FIRST, MIDDLE = Slice(0, 8), Slice(0, 3), Slice(3, 6)
PAGES, PAGE = 32, 16
CHECKPOINT = open_checkpoint("shoal-tiny")


@cache
def stage_of(layers: Slice) -> Stage:
    return Stage(load_slice(CHECKPOINT, layers, "f32"), StageConfig(page_size=PAGE, pages=PAGES))


class FakeLinks:
    """Everybody is connected but those in `unknown`; those in `full` take nothing more."""

    def __init__(self) -> None:
        self.sent: list[tuple[NodeId, Message]] = []
        self.unknown: set[NodeId] = set()
        self.full: set[NodeId] = set()
        self.dropped: list[NodeId] = []
        self.connecting: dict[NodeId, asyncio.Future[None]] = {}
        self.draining: dict[NodeId, asyncio.Future[None]] = {}
        self.lost: Callable[[NodeId, str], None] = lambda node, why: None

    def on(self, channel: int, handler: object) -> None: ...

    def on_lost(self, handler: Callable[[NodeId, str], None]) -> None:
        self.lost = handler

    def is_connected(self, node: NodeId) -> bool:
        return node not in self.unknown and node not in self.connecting

    def send(self, node: NodeId, frame: Frame) -> None:
        if node in self.unknown:
            raise LinkClosed("nobody knows where it is")
        if node in self.full:
            raise Overloaded("it does not read")
        assert len(frame.header) <= 64 << 10
        assert memoryview(frame.body).nbytes <= 32 << 20
        self.sent.append((node, from_frame(frame)))

    async def connect(self, node: NodeId) -> None:
        if node in self.connecting:
            await self.connecting[node]
        if node in self.unknown:
            raise LinkClosed("nobody knows where it is")

    async def drain(self, node: NodeId) -> None:
        await self.connect(node)
        if node in self.draining:
            await self.draining[node]

    def drop(self, node: NodeId, reason: str) -> None:
        self.dropped.append(node)
        self.lost(node, reason)

    def to(self, node: NodeId, kind: type) -> list[Any]:
        return [message for to, message in self.sent if to == node and isinstance(message, kind)]


class HostileNode:
    """A pipeline under attack, its worker tasks, and the clock it goes by."""

    def __init__(self, config: StageSessionsConfig | None = None) -> None:
        self.links, self.thread, self.now = FakeLinks(), EngineThread(1), 0.0
        self.plan: Plan | None = None
        self.pipeline = Pipeline(
            cast(Links, self.links), self._plan, emit=ignore, clock=lambda: self.now
        )
        self._config = config or StageSessionsConfig()

    def _plan(self, wish: Wish) -> Plan:
        if self.plan is None or wish.avoid & {stop.node for stop in self.plan.stops}:
            raise NoRoute("no route")
        return self.plan

    def serve(self, layers: Slice) -> StageWorker:
        sessions = StageSessions(
            me=ME,
            first=layers.start == 0,
            last=layers.stop == 8,
            vocab_size=CHECKPOINT.vocab_size,
            context_length=CHECKPOINT.context_length,
            pool=PrefixPool(PAGES, PAGE),
            make_sampler=SamplerState,
            config=self._config,
            layers=layers,
        )
        worker = StageWorker(
            StageKey(CHECKPOINT.model_id, "f32", layers),
            sessions,
            stage_of(layers),
            thread=self.thread,
            links=cast(Links, self.links),
            emit=ignore,
            clock=lambda: self.now,
        )
        worker.guess_with(NgramDrafter())
        self.pipeline.serve(worker)
        return worker

    def receive(self, sender: NodeId, message: Message, body: bytes = b"") -> None:
        self.pipeline.receive(sender, to_frame(message, body))

    async def settle(self) -> None:
        """Until nothing is left to compute."""
        for _ in range(3):
            await asyncio.sleep(0)
        await self.thread.run(int)
        for _ in range(3):
            await asyncio.sleep(0)

    async def until(self, happened: Callable[[], object]) -> None:
        async with asyncio.timeout(5):
            while not happened():
                await self.settle()


@asynccontextmanager
async def hostile_node(config: StageSessionsConfig | None = None) -> AsyncIterator[HostileNode]:
    node = HostileNode(config)
    async with node.thread, node.pipeline:
        node.serve(WHOLE)
        node.serve(MIDDLE)
        await asyncio.sleep(0)
        yield node
