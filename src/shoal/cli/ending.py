"""How a running node is asked to end: by SIGINT, SIGTERM, or the death of whoever started it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from threading import Thread
from time import sleep

import anyio

from .signals import SIGNALS

PARENT_PATIENCE_S = 3.0


class Ending:
    """The first signal ends the node in order, the second at once. Made inside the event loop."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.signal = 0
        self.starting = anyio.CancelScope()  # what may be cut off: nobody relies on us yet
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._receive, number)

    def _receive(self, number: int) -> None:
        if self.signal:
            os._exit(128 + number)
        self.signal = number
        self.asked.set()
        self.starting.cancel()


def leave_with_parent() -> None:
    """When stdin closes, whoever started us is gone: end as after SIGTERM, by force if stuck."""

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        sleep(PARENT_PATIENCE_S)
        os._exit(128 + signal.SIGTERM)

    Thread(target=watch, name="parent-watch", daemon=True).start()
