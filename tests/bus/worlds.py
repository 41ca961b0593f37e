"""The same world twice, so that one test body runs over memory and over real Nostr relays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Any, Protocol

from nostr_sdk import ClientBuilder, Keys, RelayUrl

from shoal.bus import Bus
from shoal.bus import nostr_events as events
from shoal.bus.inbox import Note
from shoal.bus.memory import MemoryBus, MemoryRelay, Posted
from shoal.bus.nostr import NostrBus, NostrBusConfig
from shoal.bus.relay import EmbeddedRelay
from shoal.events import Emit, ignore
from shoal.identity import Identity, Mesh

from .nodes import CLUB

QUICK = NostrBusConfig(retry_s=1.0, backoff=False, connect_timeout_s=1.0)


class World(Protocol):
    async def relay(self) -> str:
        """Start a relay; returns its URL."""

    async def stop(self, url: str) -> None: ...

    async def start(self, url: str) -> None: ...

    def bus(
        self, who: Identity, *urls: str, mesh: Mesh = CLUB, emit: Emit = ignore
    ) -> Any:  # a Bus
        ...

    async def inject(self, url: str, who: Identity, content: str, **stamps: int) -> None:
        """Put an announcement of `who` with any content on the relay."""

    async def close(self) -> None: ...


class MemoryWorld:
    def __init__(self) -> None:
        self._relays: dict[str, MemoryRelay] = {}

    async def relay(self) -> str:
        url = f"memory://{len(self._relays)}"
        self._relays[url] = MemoryRelay(url)
        return url

    async def stop(self, url: str) -> None:
        self._relays[url].stop()

    async def start(self, url: str) -> None:
        self._relays[url].start()

    def bus(self, who: Identity, *urls: str, mesh: Mesh = CLUB, emit: Emit = ignore) -> Bus:
        relays = [self._relays[url] for url in urls]
        reachable = list(self._relays.values())
        return MemoryBus(who, mesh, relays, reachable=reachable, emit=emit)

    async def inject(self, url: str, who: Identity, content: str, **stamps: int) -> None:
        note = Note(
            who.node,
            stamps["created_at"],
            stamps.get("expires_at"),
            (CLUB.topic,),
            content,
            lambda: True,
        )
        self._relays[url].post(Posted("announcement", note))

    async def close(self) -> None:
        """Nothing to close."""


class NostrWorld:
    def __init__(self) -> None:
        self._relays: dict[str, EmbeddedRelay] = {}
        self._stack = AsyncExitStack()

    async def relay(self) -> str:
        relay = await EmbeddedRelay().__aenter__()
        self._relays[relay.url] = relay
        return relay.url

    async def stop(self, url: str) -> None:
        await self._relays[url].__aexit__()

    async def start(self, url: str) -> None:
        port = int(url.rpartition(":")[2])
        self._relays[url] = await EmbeddedRelay(port=port).__aenter__()

    def bus(self, who: Identity, *urls: str, mesh: Mesh = CLUB, emit: Emit = ignore) -> Bus:
        return NostrBus(who, mesh, urls, config=QUICK, emit=emit)

    async def inject(self, url: str, who: Identity, content: str, **stamps: int) -> None:
        keys = Keys.parse(who.nostr_secret().hex())
        stamps.setdefault("expires_at", stamps["created_at"] + 10_000)
        await send_event(url, events.announcement_event(keys, (CLUB.topic,), content, **stamps))

    async def close(self) -> None:
        for relay in self._relays.values():
            await relay.__aexit__()


async def send_event(url: str, *notes: Any) -> None:
    """Publish events with a client of its own, and wait for the relay's answer."""
    client = ClientBuilder().build()
    await client.add_relay(RelayUrl.parse(url))
    await client.connect(timedelta(seconds=3))
    for note in notes:
        output = await client.send_event(note, ok_timeout=timedelta(seconds=3))
        assert not output.failed, output.failed
    await client.shutdown()


WORLDS: Sequence[Callable[[], World]] = (MemoryWorld, NostrWorld)
