"""The twin of the engine thread: what runs in it takes virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, Self, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class SimThread:
    """Calls are done one by one, in order. While one runs, it tells `spend` how long it takes."""

    def __init__(self) -> None:
        self.busy_s = 0.0  # all that was spent
        self._turn = asyncio.Lock()
        self._spent_s = 0.0
        self._free_at = 0.0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Nothing to wait for."""

    def spend(self, seconds: float) -> None:
        self._spent_s += seconds

    async def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """A cancelled caller stops waiting; what has begun is computed to its end."""
        loop = asyncio.get_running_loop()
        async with self._turn:
            if self._free_at > loop.time():
                await asyncio.sleep(self._free_at - loop.time())
            self._spent_s = 0.0
            try:
                return function(*args, **kwargs)
            finally:
                self.busy_s += self._spent_s
                self._free_at = loop.time() + self._spent_s
                if self._spent_s:
                    await asyncio.sleep(self._spent_s)
