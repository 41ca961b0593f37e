"""SIGINT and SIGTERM as one exception in the main thread, and places where it has to wait."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

from .failure import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruptible:
    """Within `with`, a signal raises Stopped wherever the program is, but never inside `held()`."""

    def __init__(self) -> None:
        self._before: list[Any] = []
        self._holds = 0
        self._pending = 0

    def __enter__(self) -> Self:
        self._before = [signal.signal(number, self._received) for number in SIGNALS]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for number, handler in zip(SIGNALS, self._before, strict=True):
            signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Finish what is inside first: starting a process and noting it, or cleaning up."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
        self._deliver()

    def _received(self, number: int, frame: FrameType | None) -> None:
        self._pending = number
        self._deliver()

    def _deliver(self) -> None:
        if self._pending and not self._holds:
            number, self._pending = self._pending, 0
            raise Stopped(number)
