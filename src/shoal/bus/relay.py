"""A Nostr relay inside this process: the default when a mesh has none."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Self

from nostr_sdk import (  # type: ignore[import-untyped]
    LocalRelay,
    LocalRelayBuilder,
    NostrLmdb,
    NostrSdkError,
    RateLimit,
)
from nostr_sdk.nostr_sdk import uniffi_set_event_loop  # type: ignore[import-untyped]

from ..errors import BadConfig
from .base import MAX_KEPT

# of one connection; a member announces a few times a minute and sends letters now and then
_LIMIT = RateLimit(max_reqs=100, notes_per_minute=1200)
_MAX_CONNECTIONS = 1024
_LOCAL = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}  # noqa: S104 - where WE dial it
_GRACE_S = 0.02


class EmbeddedRelay:
    """Serves ws://host:port while entered; port 0 picks a free one. One event loop a process.

    `url` is where this machine reaches it, also when it listens on all addresses.

    Keeps events in memory, or in an LMDB folder when `database` is given (slower by 3 to 17
    times). Raises BadConfig when the port is taken or the folder cannot be used.
    """

    def __init__(
        self, *, host: str = "127.0.0.1", port: int = 0, database: Path | None = None
    ) -> None:
        self._host, self._port, self._database = host, port, database
        self._relay: LocalRelay | None = None  # a dropped LocalRelay may stop listening
        self.url = ""
        self.port = 0

    async def __aenter__(self) -> Self:
        uniffi_set_event_loop(asyncio.get_running_loop())
        builder = LocalRelayBuilder().addr(self._host).rate_limit(_LIMIT)
        builder = builder.max_connections(_MAX_CONNECTIONS)
        builder = builder.default_filter_limit(MAX_KEPT).max_filter_limit(MAX_KEPT)
        if self._port:
            builder = builder.port(self._port)
        try:
            if self._database is not None:
                builder = builder.database(await NostrLmdb.open(str(self._database)))
            self._relay = builder.build()
            await self._relay.run()
        except NostrSdkError as error:
            raise BadConfig(
                f"the embedded relay cannot start on {self._host}:{self._port}: {error}",
                hint="choose another port, or use a relay that runs already with --relay",
            ) from None
        self.port = int(str(await self._relay.url()).rstrip("/").rpartition(":")[2])
        self.url = f"ws://{_LOCAL.get(self._host, self._host)}:{self.port}"
        return self

    async def __aexit__(self, *exc: object) -> None:
        """A connection that is busy at the moment of a shutdown misses it, hence the second."""
        if self._relay is not None:
            self._relay.shutdown()
            await asyncio.sleep(_GRACE_S)
            self._relay.shutdown()
