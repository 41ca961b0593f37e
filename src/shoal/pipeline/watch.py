"""Notices that a forward does not come back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

TICKS = 4


class Watch:
    """Calls `hangs` once a forward has run for `limit_s`, unless cancelled before. What waits for
    its turn in the engine thread has not `begun`. Time is told in ticks: a process that stood still
    and goes on has missed one at most.
    """

    def __init__(self, limit_s: float, hangs: Callable[[], None]) -> None:
        self.begun = False  # set in the engine thread
        self._tick_s, self._hangs, self._ticks = limit_s / TICKS, hangs, 0
        self._timer = self._arm()

    def _arm(self) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(self._tick_s, self._tick)

    def _tick(self) -> None:
        self._ticks += self.begun
        if self._ticks == TICKS:
            self._hangs()
        else:
            self._timer = self._arm()

    def cancel(self) -> None:
        self._timer.cancel()
