"""The worker around another engine: streams, failures, and how it goes away and comes back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from shoal.engine.request import Sampled, Sampling
from shoal.engine.served import Job
from shoal.errors import BackendFailed
from shoal.pipeline import fronted
from shoal.pipeline.fronted import FrontedWorker, next_wait
from shoal.pipeline.fronted_sessions import FrontedSessions, Slots
from shoal.pipeline.messages import Lost, Message, Open, Tokens, from_frame, pack_ids
from shoal.pipeline.stage_key import StageKey
from shoal.units import ModelId, NodeId, SessionId, Slice

ME, GATEWAY = NodeId("npub1" + "m" * 58), NodeId("npub1" + "g" * 58)
KEY = StageKey(ModelId("m"), "served", Slice(0, 4))
SESSION = SessionId("a" * 16)
pytestmark = pytest.mark.anyio


class ScriptedEngine:
    """Gives what is put into `says`; an exception there is raised. `well` is asked when it is
    looked after.
    """

    name = "an engine of a test"

    def __init__(self) -> None:
        self.says: asyncio.Queue[list[Sampled] | BackendFailed] = asyncio.Queue()
        self.streams = 0
        self.well = True
        self.asked: list[str] = []

    async def generate(self, job: Job) -> AsyncGenerator[list[Sampled], None]:
        self.streams += 1
        try:
            while True:
                said = await self.says.get()
                if isinstance(said, BackendFailed):
                    raise said
                yield said
                if said[-1].finish:
                    return
        finally:
            self.streams -= 1

    async def alive(self) -> None:
        self._look("alive")

    async def probe(self) -> None:
        self._look("probe")

    def _look(self, how: str) -> None:
        self.asked.append(how)
        if not self.well:
            raise BackendFailed("down")


class Wire:
    """Links that only note what was sent."""

    def __init__(self) -> None:
        self.sent: asyncio.Queue[Message] = asyncio.Queue()

    def send(self, node: NodeId, frame: Any) -> None:
        assert node == GATEWAY
        self.sent.put_nowait(from_frame(frame))


class Bench:
    """A worker that runs, and what it says."""

    def __init__(self, check_s: float) -> None:
        self.engine, self.wire = ScriptedEngine(), Wire()
        self.changes: asyncio.Queue[bool] = asyncio.Queue()
        sessions = FrontedSessions(ME, 100, Slots(2, 64), lambda sampling: "")
        self.worker = FrontedWorker(
            KEY,
            sessions,
            self.engine,  # type: ignore[arg-type]
            links=self.wire,  # type: ignore[arg-type]
            clock=asyncio.get_running_loop().time,
            changed=self.changes.put_nowait,
            check_s=check_s,
        )

    def open(self) -> None:
        message = Open(
            session=SESSION,
            model=KEY.model,
            compute=KEY.compute,
            layers=KEY.layers,
            previous=ME,
            next=ME,
            known_tokens=3,
            reserve_tokens=11,
            sampling=Sampling(max_tokens=8),
        )
        self.worker.open(message, pack_ids((1, 2, 3)), GATEWAY)

    async def said(self) -> Message:
        return await asyncio.wait_for(self.wire.sent.get(), 10)

    async def changed(self) -> bool:
        return await asyncio.wait_for(self.changes.get(), 10)


@asynccontextmanager
async def running(check_s: float = 60.0) -> AsyncIterator[Bench]:
    bench = Bench(check_s)
    task = asyncio.create_task(bench.worker.run())
    await asyncio.sleep(0)
    try:
        yield bench
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert bench.engine.streams == 0, "every stream was closed"


async def test_an_answer_is_told_token_by_token_and_leaves_nothing_behind() -> None:
    async with running() as bench:
        bench.open()
        await bench.said()
        for said in ([Sampled(4)], [Sampled(5), Sampled(6, "stop")]):
            bench.engine.says.put_nowait(said)
            told = await bench.said()
            assert isinstance(told, Tokens)
            assert [entry.sampled for entry in told.entries] == said
        await asyncio.wait_for(bench.worker.idle.wait(), 10)
        assert len(bench.worker.sessions) == 0


async def test_a_cancelled_session_closes_its_stream() -> None:
    async with running() as bench:
        bench.open()
        await bench.said()
        bench.engine.says.put_nowait([Sampled(4)])
        await bench.said()
        assert bench.engine.streams == 1
        bench.worker.close(SESSION, GATEWAY)
        while bench.engine.streams:
            await asyncio.sleep(0)
        assert bench.worker.idle.is_set()


async def test_a_broken_stream_is_told_and_the_engine_looked_at_at_once() -> None:
    async with running() as bench:
        bench.open()
        await bench.said()
        bench.engine.well = False
        bench.engine.says.put_nowait(BackendFailed("it broke"))
        told = await bench.said()
        assert isinstance(told, Lost)
        assert (told.node, told.message) == (ME, "it broke")
        assert await bench.changed() is False
        assert bench.worker.draining


async def test_a_failed_answer_of_a_well_engine_changes_nothing() -> None:
    async with running() as bench:
        bench.open()
        await bench.said()
        bench.engine.says.put_nowait(BackendFailed("it broke"))
        assert isinstance(await bench.said(), Lost)
        while not bench.engine.asked:
            await asyncio.sleep(0)
        assert not bench.worker.draining
        assert bench.changes.empty()


async def test_it_comes_back_by_itself_and_is_asked_anew_what_it_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fronted, "SOON_S", 0.001)
    async with running(check_s=0.001) as bench:
        bench.engine.well = False
        assert await bench.changed() is False
        bench.engine.well = True
        assert await bench.changed() is True
        assert not bench.worker.draining
        assert "probe" in bench.engine.asked


async def test_who_leaves_is_not_brought_back_by_a_healthy_engine() -> None:
    async with running() as bench:
        bench.worker.draining = True
        assert bench.worker.draining
        assert bench.worker.answers


async def test_taken_out_of_service_every_gateway_is_told() -> None:
    async with running() as bench:
        bench.open()
        await bench.said()
        bench.worker.shut_down()
        assert isinstance(await bench.said(), Lost)


def test_looks_at_a_dead_engine_get_rarer() -> None:
    waits = [next_wait(0.0)]
    while waits[-1] < fronted.LATE_S:
        waits.append(next_wait(waits[-1]))
    assert waits[:3] == [0.5, 1.0, 2.0]
    assert waits[-1] == fronted.LATE_S
