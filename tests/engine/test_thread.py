import asyncio
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from shoal.engine.stage import Stage, StageConfig
from shoal.engine.thread import EngineThread
from shoal.exact import native
from shoal.models.checkpoint import Checkpoint
from shoal.models.slice import load_slice
from shoal.units import Quant

pytestmark = pytest.mark.anyio


async def test_everything_runs_in_order_in_one_thread_that_is_not_ours() -> None:
    seen: list[tuple[int, str]] = []

    def note(number: int) -> int:
        seen.append((number, threading.current_thread().name))
        return number

    async with EngineThread() as thread:
        results = await asyncio.gather(*(thread.run(note, number) for number in range(20)))
    assert results == list(range(20))
    assert [number for number, _ in seen] == list(range(20))
    (name,) = {name for _, name in seen}
    assert name.startswith("shoal-engine")


async def test_an_error_reaches_the_caller_and_the_thread_lives_on() -> None:
    async with EngineThread() as thread:
        with pytest.raises(ZeroDivisionError):
            await thread.run(divmod, 1, 0)
        assert await thread.run(divmod, 7, 2) == (3, 1)


async def test_torch_uses_the_threads_that_it_was_given() -> None:
    before = torch.get_num_threads()
    try:
        async with EngineThread(threads=1) as thread:
            assert await thread.run(torch.get_num_threads) == 1
    finally:
        torch.set_num_threads(before)


async def test_without_torch_the_thread_starts_with_a_number_of_threads_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    async with EngineThread(threads=1) as thread:
        assert await thread.run(divmod, 7, 2) == (3, 1)


async def test_closing_waits_for_what_is_being_computed() -> None:
    begun, finish = threading.Event(), threading.Event()
    done: list[bool] = []

    def slow() -> None:
        begun.set()
        done.append(finish.wait(10))

    thread = EngineThread()
    async with thread:
        running = asyncio.ensure_future(thread.run(slow))
        await asyncio.to_thread(begun.wait)
        asyncio.get_running_loop().call_later(0.01, finish.set)
    assert done == [True]
    await running
    with pytest.raises(RuntimeError, match="not running"):
        await thread.run(slow)


@pytest.mark.skipif(native.load() is None, reason="no compiled library on this machine")
async def test_a_stage_of_floats_gets_its_threads_back_after_an_exact_one(
    tiny: Callable[[str], tuple[Checkpoint, Any]],
) -> None:
    checkpoint, _ = tiny("llama")

    def threads_with(quant: Quant) -> int:
        Stage(load_slice(checkpoint, checkpoint.whole, quant=quant), StageConfig(pages=2))
        return torch.get_num_threads()

    async with EngineThread(2) as thread:
        assert [await thread.run(threads_with, kind) for kind in ("int8", "none")] == [1, 2]
