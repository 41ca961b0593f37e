"""Several ways to the same goal, started one after the other: the first that arrives wins."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from ..errors import LinkClosed, ShoalError

T = TypeVar("T")


async def first_success(
    attempts: Sequence[Callable[[], Coroutine[Any, Any, T]]],
    *,
    stagger_s: float,
    discard: Callable[[T], None],
) -> T:
    """The first result. A further attempt starts after `stagger_s`, or as soon as one has failed.

    The others are cancelled; a result that comes nevertheless goes to `discard`. Raises LinkClosed
    with every reason when all attempts have failed by a ShoalError or an OSError.
    """
    running: set[asyncio.Task[T]] = set()
    reasons: list[str] = []
    to_start = list(attempts)
    try:
        while to_start or running:
            if to_start:
                running.add(asyncio.create_task(to_start.pop(0)()))
            done, running = await asyncio.wait(
                running,
                timeout=stagger_s if to_start else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            winners = [task for task in done if _succeeded(task, reasons)]
            for late in winners[1:]:
                discard(late.result())
            if winners:
                return winners[0].result()
        raise LinkClosed("; ".join(reasons) or "there is no address to dial")
    finally:
        for task in running:
            task.cancel()
            task.add_done_callback(lambda task: _discard_if_done(task, discard))


def _succeeded(task: asyncio.Task[T], reasons: list[str]) -> bool:
    """A failure is noted; one that is no failure of the network is raised."""
    error = task.exception()
    if error is None:
        return True
    if not isinstance(error, ShoalError | OSError):
        raise error
    reasons.append(str(error) or type(error).__name__)
    return False


def _discard_if_done(task: asyncio.Task[T], discard: Callable[[T], None]) -> None:
    if not task.cancelled() and task.exception() is None:
        discard(task.result())
