"""The clock that jumps."""

from __future__ import annotations

import asyncio
import time

import pytest

from shoal.sim.loop import OWNER, NothingLeft, OutOfTime, VirtualLoop, run


def test_an_hour_passes_in_no_time() -> None:
    async def main() -> float:
        await asyncio.sleep(3600)
        return asyncio.get_running_loop().time()

    began = time.monotonic()
    assert run(main) == 3600
    assert time.monotonic() - began < 1


def test_what_is_due_at_the_same_time_runs_in_the_order_asked_for() -> None:
    async def main() -> list[int]:
        ran: list[int] = []
        loop = asyncio.get_running_loop()
        for number in range(100):
            loop.call_at(1.0, ran.append, number)
        await asyncio.sleep(2)
        return ran

    assert run(main) == list(range(100))


def test_a_deadlock_is_told_with_where_everybody_waits() -> None:
    async def waits_for_nobody() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(NothingLeft, match=r"waits_for_nobody:\d+"):
        run(waits_for_nobody)


def test_what_never_ends_is_stopped_at_the_limit() -> None:
    async def forever() -> None:
        while True:
            await asyncio.sleep(0.3)

    with pytest.raises(OutOfTime, match=r"not done at 10\.000 s"):
        run(forever, limit_s=10)


def test_a_timeout_in_virtual_time_fires() -> None:
    async def main() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await asyncio.sleep(50)
        return asyncio.get_running_loop().time()

    assert run(main) == 5


def test_threads_are_refused() -> None:
    async def main() -> None:
        await asyncio.to_thread(time.time)

    with pytest.raises(RuntimeError, match="wants a thread"):
        run(main)


def test_cancelled_timers_are_swept_out() -> None:
    async def main() -> int:
        loop = asyncio.get_running_loop()
        for _ in range(5000):
            loop.call_later(1000, print).cancel()
        await asyncio.sleep(1)
        return len(loop._timers)  # type: ignore[attr-defined]

    assert run(main) < 2000


def test_the_clock_can_start_anywhere() -> None:
    async def main() -> float:
        await asyncio.sleep(1)
        return asyncio.get_running_loop().time()

    assert run(main, start_s=1000, limit_s=1002) == 1001


def test_who_is_stopped_does_nothing_and_then_all_at_once() -> None:
    async def main() -> tuple[list[float], float]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        ticks: list[float] = []

        async def tick() -> None:
            OWNER.set("amber")
            for at in range(1, 10):
                loop.call_at(at, lambda: ticks.append(loop.time()))
            await asyncio.sleep(10)
            ticks.append(-loop.time())

        task = asyncio.create_task(tick())
        await asyncio.sleep(2.5)
        loop.stop_owner("amber")
        await asyncio.sleep(4)
        assert ticks == [1, 2]
        loop.continue_owner("amber")
        await task
        return ticks, loop.time()

    assert run(main) == ([1, 2, 6.5, 6.5, 6.5, 6.5, 7, 8, 9, -10], 10)


def test_who_looks_when_time_is_up_finds_it_up() -> None:
    async def main() -> int:
        loop, looks = asyncio.get_running_loop(), 0
        for at in range(1000):
            heard = loop.time()
            await asyncio.sleep(0.0007 * at)
            while loop.time() - heard < 0.9:
                looks += 1
                await asyncio.sleep(heard + 0.9 - loop.time())
        return looks

    assert run(main) <= 1000
