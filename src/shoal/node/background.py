"""Tasks that run beside everything else."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from functools import partial
from typing import Self


class Background:
    """Leaving the block cancels what still runs in it, in the order in which it was started."""

    def __init__(self) -> None:
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def start(
        self, work: Coroutine[None, None, None], failed: asyncio.Future[None] | None = None
    ) -> asyncio.Task[None] | None:
        """Run `work`; what it raises is put into `failed`, for whoever runs the node, or is no
        news without one. Once the block is left, nothing is started any more.
        """
        if self._closed:
            work.close()
            return None
        task = asyncio.ensure_future(work)
        self._tasks[task] = None
        task.add_done_callback(partial(self._done, failed))
        return task

    def _done(self, failed: asyncio.Future[None] | None, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task, None)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if failed is not None and not failed.done():
            failed.set_exception(error)
            failed.exception()  # whoever waits gets it; without a waiter it is no news
