"""Notices that nobody waits for an answer any more: the client left, or this node stops."""

from __future__ import annotations

import asyncio
from typing import NoReturn

from starlette.types import Receive

from .failures import ShuttingDown


class ClientLeft(Exception):
    """The connection is gone: there is nobody to answer."""


class Presence:
    """Watches the connections of all requests in progress."""

    def __init__(self) -> None:
        self._watchers: set[asyncio.Task[NoReturn]] = set()
        self._closing = False

    def watch(self, group: asyncio.TaskGroup, receive: Receive) -> asyncio.Task[NoReturn]:
        """Ends `group` with ClientLeft or ShuttingDown, unless it is released before."""
        if self._closing:
            raise ShuttingDown("this node is shutting down")
        watcher = group.create_task(self._until_over(receive))
        self._watchers.add(watcher)
        watcher.add_done_callback(self._watchers.discard)
        return watcher

    def release(self, watcher: asyncio.Task[NoReturn]) -> None:
        """The answer is out."""
        self._watchers.discard(watcher)
        watcher.cancel()

    def close(self) -> None:
        """End every request in progress, each with an explicit error."""
        self._closing = True
        for watcher in list(self._watchers):
            watcher.cancel()

    async def _until_over(self, receive: Receive) -> NoReturn:
        try:
            while (await receive())["type"] != "http.disconnect":
                pass
        except asyncio.CancelledError:
            if self._closing and asyncio.current_task() in self._watchers:
                raise ShuttingDown("this node is shutting down") from None
            raise
        raise ClientLeft
