"""Tasks beside everything else; a machine that slept."""

from __future__ import annotations

import asyncio

from shoal.errors import NoCapacity
from shoal.node.background import Background
from shoal.node.waking import GAP_S, LOOK_S, watch
from shoal.sim.loop import run


def test_what_a_task_dies_of_reaches_whoever_runs_the_node() -> None:
    async def dies() -> None:
        raise NoCapacity("too small")

    async def story() -> BaseException | None:
        failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        async with Background() as tasks:
            tasks.start(dies())
            tasks.start(dies(), failed)
            tasks.start(dies(), failed)
            await asyncio.sleep(1)
            return failed.exception()

    assert isinstance(run(story), NoCapacity)


def test_nothing_starts_once_the_block_is_left_and_what_ran_is_cancelled() -> None:
    async def story() -> None:
        log: list[str] = []

        async def work() -> None:
            try:
                await asyncio.sleep(10)
                log.append("done")
            finally:
                tasks.start(late())

        async def late() -> None:
            log.append("late")

        async with Background() as tasks:
            task = tasks.start(work())
            await asyncio.sleep(1)
        assert task is not None
        assert task.cancelled()
        await asyncio.sleep(20)
        assert tasks.start(late()) is None
        assert log == []

    run(story)


def test_a_gap_in_either_clock_is_noticed_and_a_clock_that_is_set_back_is_not() -> None:
    async def story() -> None:
        loop, slept_s, set_s = asyncio.get_running_loop(), 0.0, 0.0
        woke: list[str] = []
        now = ""
        watching = asyncio.ensure_future(
            watch(
                lambda: loop.time() + slept_s,
                lambda: loop.time() + slept_s + set_s,
                lambda: woke.append(now),
            )
        )
        await asyncio.sleep(60)
        now, slept_s = "stopped for 10 s", 10.0
        await asyncio.sleep(60)
        now, set_s = "slept while one clock stood still", 3600.0
        await asyncio.sleep(60)
        now, set_s = "set back", 0.0
        await asyncio.sleep(60)
        now, slept_s = "a busy machine", 10.0 + GAP_S - 0.1
        await asyncio.sleep(60)
        watching.cancel()
        assert woke == ["stopped for 10 s", "slept while one clock stood still"]

    run(story)
    assert LOOK_S < GAP_S
