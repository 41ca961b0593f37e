"""How a running node is asked to end: by SIGINT, SIGTERM, or the death of whoever started it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from threading import Thread
from time import sleep

import anyio

from .signals import SIGNALS

PARENT_PATIENCE_S = 3.0
AT_ONCE_S = 3.0  # for saying goodbye in a hurry


class Ending:
    """The first signal ends the node in order; the second calls `hurry`, and what is not over soon
    after is ended by force, as by a third. Made inside the event loop.
    """

    def __init__(self, hurry: Callable[[], None]) -> None:
        self.asked = asyncio.Event()
        self.signal = self._count = 0
        self._hurry = hurry
        self.starting = anyio.CancelScope()  # what may be cut off: nobody relies on us yet
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._receive, number)

    def _receive(self, number: int) -> None:
        self._count += 1
        if self._count == 1:
            self.signal = number
            self.asked.set()
            self.starting.cancel()
        elif self._count == 2:
            self._hurry()
            Thread(target=end_soon, args=(number,), name="at-once", daemon=True).start()
        else:
            os._exit(128 + number)


def end_soon(number: int) -> None:
    sleep(AT_ONCE_S)
    os._exit(128 + number)


def leave_with_parent() -> None:
    """When stdin closes, whoever started us is gone: end as after SIGTERM, by force if stuck."""

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        sleep(PARENT_PATIENCE_S)
        os._exit(128 + signal.SIGTERM)

    Thread(target=watch, name="parent-watch", daemon=True).start()
