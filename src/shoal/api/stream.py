"""Server-sent events over one HTTP response, begun as late as possible."""

from __future__ import annotations

import asyncio
from typing import NoReturn

from starlette.types import Send

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
]


class EventStream:
    """The response starts with the first write: whatever fails before may still be a plain error.

    Several tasks may write; each write is whole.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._writing = asyncio.Lock()
        self._quiet = True
        self.started = False

    async def write(self, data: bytes, last: bool = False) -> None:
        """Waits while the client reads too slowly, and always for one turn of the event loop: what
        has piled up keeps nobody waiting, and a client that left is noticed.
        """
        async with self._writing:
            if not self.started:
                self.started = True
                await self._send(
                    {"type": "http.response.start", "status": 200, "headers": _HEADERS}
                )
            self._quiet = False
            await self._send({"type": "http.response.body", "body": data, "more_body": not last})
        await asyncio.sleep(0)

    async def keep_alive(self, interval_s: float) -> NoReturn:
        """Send a comment whenever `interval_s` passed in silence: proxies drop silent lines."""
        while True:
            self._quiet = True
            await asyncio.sleep(interval_s)
            if self._quiet:
                await self.write(b": still working\n\n")
