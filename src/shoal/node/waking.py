"""Notices that this machine slept, or that the process was stopped, and goes on now."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

LOOK_S = 2.0
GAP_S = 3.0  # more than this beside LOOK_S, and the others may have given us up

Clock = Callable[[], float]


async def watch(clock: Clock, wall_clock: Clock, woke: Callable[[], None]) -> None:
    """Call `woke` after each gap: forever. While a machine sleeps one of the two clocks may stand
    still, and the wall clock may be set.
    """
    while True:
        before = clock(), wall_clock()
        await asyncio.sleep(LOOK_S)
        passed = max(clock() - before[0], wall_clock() - before[1])
        if passed > LOOK_S + GAP_S:
            woke()
