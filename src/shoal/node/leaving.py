"""A planned leave: nobody new comes in, what runs here is handed over or ends, and goodbye comes
last. Whoever still has a session with us finds us in the mesh until then.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from ..bus.membership import Membership
from ..errors import ShoalError
from ..events import Emit, Leaving
from ..pipeline import Pipeline, Serving

GOODBYE_S = 2.0  # for relays that do not answer
TOLD_EVERY_S = 0.25


async def leave(
    serving: Serving,
    pipeline: Pipeline,
    membership: Membership,
    *,
    patience_s: float,
    hurry: asyncio.Event,
    emit: Emit,
) -> None:
    """Back once nothing runs here any more, `patience_s` are over, or `hurry` is set."""
    serving.drain()
    pipeline.hand_over()
    waiting = asyncio.create_task(_empty(serving, pipeline, emit))
    hurrying = asyncio.create_task(hurry.wait())
    try:
        await asyncio.wait(
            (waiting, hurrying), timeout=patience_s, return_when=asyncio.FIRST_COMPLETED
        )
    finally:
        waiting.cancel()
        hurrying.cancel()
    with suppress(ShoalError, TimeoutError):
        async with asyncio.timeout(GOODBYE_S):
            await membership.leave()
    serving.stop()


async def _empty(serving: Serving, pipeline: Pipeline, emit: Emit) -> None:
    """Sessions on our stages, and the answers of our own clients, whose end we wait for."""
    told = None
    while True:
        sessions = sum(len(each.worker.sessions) for each in serving.slices if each.worker)
        left = Leaving(sessions, len(pipeline.gateway))
        if left != told:
            emit(left)
        if not (left.sessions or left.answers):
            return
        told = left
        await asyncio.sleep(TOLD_EVERY_S)
