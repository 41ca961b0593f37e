"""Serves the app on a socket, inside somebody else's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Generator
from types import TracebackType
from typing import Self

import anyio
import uvicorn
from starlette.applications import Starlette

from ..errors import BadConfig
from .presence import Presence

_BACKLOG = 1024


class ApiServer:
    """`async with ApiServer(app, port=0) as server:` listens until the block ends.

    Signals, logging and the event loop stay the caller's. Leaving the block ends every open answer
    with an explicit error, then waits at most `grace_s` for clients to take it.
    """

    def __init__(
        self, app: Starlette, host: str = "127.0.0.1", port: int = 7470, *, grace_s: int = 1
    ) -> None:
        self.host = host
        self.port = port  # the real one, once serving
        self._presence: Presence = app.state.presence
        self._server = _Uvicorn(
            uvicorn.Config(
                app,
                lifespan="off",
                log_config=None,
                access_log=False,
                ws="none",
                server_header=False,
                date_header=False,  # keeping it right would take a timer that never sleeps
                timeout_graceful_shutdown=grace_s,
            )
        )
        self._serving: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    async def __aenter__(self) -> Self:
        """Raises BadConfig when the address cannot be had."""
        listening = _bind(self.host, self.port)
        self.port = listening.getsockname()[1]
        self._serving = asyncio.create_task(self._server.serve([listening]), name="api")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._presence.close()
        self._server.stop()
        if self._serving is not None:
            with anyio.CancelScope(shield=True):
                await self._serving


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handlers and without its ten wake-ups a second."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._stopped = asyncio.Event()

    def stop(self) -> None:
        self._stopped.set()

    async def main_loop(self) -> None:
        await self._stopped.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def _bind(host: str, port: int) -> socket.socket:
    """A listening socket; connections wait in it until the server takes them.

    It names TCP as its protocol: only then does asyncio turn off Nagle's algorithm, which would
    hold back the second part of each answer for 40 ms.
    """
    listening: socket.socket | None = None
    try:
        family, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
        )[0]
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)
        return listening
    except OSError as error:
        if listening is not None:
            listening.close()
        raise BadConfig(
            f"the API cannot listen on {host} port {port}: {error.strerror or error}",
            hint="choose another port with --port, or stop the program that uses this one",
        ) from None
