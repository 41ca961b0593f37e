"""The one thread in which torch runs, and the only bridge between it and asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, Self, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def set_threads(threads: int | None, *, of_torch: bool = True) -> None:
    """How many cores one operation may use, of torch in the calling thread and of the compiled
    library; None changes nothing.

    Where the library computes all that is large, torch should have one: its other threads spin for
    a while after each operation, and the library's wait for their cores.

    Without torch the engine thread must start all the same: who loads a stage says what is missing.
    """
    if threads is not None:
        with contextlib.suppress(ImportError):
            import torch

            from ..exact import native

            all_threads()
            torch.set_num_threads(threads if of_torch else 1)
            if (library := native.load()) is not None:
                library.set_threads(threads)


@functools.cache
def all_threads() -> int:
    """As many as torch takes of itself, before anybody changes that."""
    import torch

    return torch.get_num_threads()


class EngineThread:
    """`await run(function, *arguments)` computes in the engine thread; calls are done one by one,
    in order.

    `threads` is how many cores one torch operation may use; None leaves torch's own choice.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads
        self._executor: ThreadPoolExecutor | None = None

    async def __aenter__(self) -> Self:
        self._executor = ThreadPoolExecutor(
            1,
            thread_name_prefix="shoal-engine",
            initializer=set_threads,
            initargs=(self._threads,),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """A cancelled caller stops waiting; what has begun is computed to its end."""
        if self._executor is None:
            raise RuntimeError("the engine thread is not running")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, lambda: function(*args, **kwargs))

    async def aclose(self) -> None:
        """Wait for what is being computed; what has not begun is cancelled."""
        executor, self._executor = self._executor, None
        if executor is not None:
            await asyncio.to_thread(executor.shutdown, wait=True, cancel_futures=True)
