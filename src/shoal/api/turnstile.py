"""Keeps a crowd at the door from stopping the streams that run."""

from __future__ import annotations

import asyncio
from collections import deque


class Turnstile:
    """Lets `per_turn` requests in for each turn of the event loop, in the order they came.

    Reading, templating and tokenising one request takes a fraction of a millisecond without a
    break; of a hundred at once, no running stream would get a word out before the last.
    """

    def __init__(self, per_turn: int) -> None:
        self._per_turn = per_turn
        self._free = per_turn
        self._turning = False
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def enter(self) -> None:
        if self._free and not self._waiting:
            self._free -= 1
            self._keep_turning()
            return
        mine = asyncio.get_running_loop().create_future()
        self._waiting.append(mine)
        await mine

    def _turn(self) -> None:
        """A new turn of the loop: as many places as before."""
        self._turning = False
        self._free = self._per_turn
        while self._free and self._waiting:
            first = self._waiting.popleft()
            if not first.done():  # else it was cancelled
                first.set_result(None)
                self._free -= 1
        if self._free < self._per_turn:
            self._keep_turning()

    def _keep_turning(self) -> None:
        if not self._turning:
            self._turning = True
            asyncio.get_running_loop().call_soon(self._turn)
