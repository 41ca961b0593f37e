"""A bus without sockets, for tests and simulation: the same notes, checks and listeners.

Made for thousands of nodes in one process: a note is proved once and not by every bus that hears
it, and goes to all who hear it at one time in one call.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Self

from ..errors import BadConfig, LinkClosed
from ..events import Emit, RelayChanged, ignore
from ..identity import Identity, Mesh
from ..units import NodeId
from .announcement import Announcement
from .base import Listener, RelayStatus, nobody
from .cells import cell_of, tag, tags
from .inbox import Inbox, Note, Unsealed
from .letters import announcement_text, goodbye_text, letter_text
from .limits import Bounded
from .memory_relay import MemoryRelay, Posted

__all__ = ["MemoryBus", "MemoryRelay", "Posted"]

_MAX_REMEMBERED = 4096


class MemoryBus:
    """See `Bus`. `reachable` are relays that `add_relay` may find by their URL."""

    def __init__(
        self,
        identity: Identity,
        mesh: Mesh,
        relays: Sequence[MemoryRelay] = (),
        *,
        reachable: Sequence[MemoryRelay] = (),
        emit: Emit = ignore,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.node, self.topic = identity.node, mesh.topic  # the relays look at these two
        self._mesh, self._emit = mesh, emit
        self._topics, self._cell = tags(mesh.topic, identity.node), cell_of(identity.node)
        self._wanted = tuple(relay.url for relay in relays)
        self._reachable = {relay.url: relay for relay in (*relays, *reachable)}
        proved = relays[0].proved if relays else MemoryRelay().proved
        self._inbox = Inbox(mesh, identity.node, clock, proved.believe)
        self._stamps = self._inbox.stamps
        self._serials = itertools.count()
        self._seen: Bounded[tuple[object, ...], None] = Bounded(_MAX_REMEMBERED)
        self._relays: dict[str, MemoryRelay] = {}
        self._connected: dict[str, bool] = {}
        self._announced: Posted | None = None
        self._sequence = 0  # of our last announcement

    @property
    def dropped(self) -> Counter[str]:
        return self._inbox.dropped

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(self._relays) or self._wanted

    def status(self) -> list[RelayStatus]:
        return [
            RelayStatus(url, up, 1, "" if up else "no connection")
            for url, relay in self._relays.items()
            for up in [relay.serves(self.node)]
        ]

    def listen(
        self,
        on_announcement: Callable[[Announcement], None] = nobody,
        on_gone: Callable[[NodeId], None] = nobody,
        on_sealed: Callable[[NodeId, bytes], None] = nobody,
        on_clock: Callable[[float], None] = nobody,
    ) -> None:
        self._inbox.listener = Listener(on_announcement, on_gone, on_sealed, on_clock)

    def now(self) -> float:
        return self._stamps.now()

    @property
    def offset_s(self) -> float:
        return self._stamps.offset_s

    async def __aenter__(self) -> Self:
        for url in self._wanted:
            await self.add_relay(url)
        return self

    async def __aexit__(self, *exc: object) -> None:
        for relay in self._relays.values():
            relay.detach(self)
        self._relays.clear()

    async def add_relay(self, url: str) -> None:
        if url in self._relays:
            return
        if url not in self._reachable:
            raise BadConfig(f"no relay in memory is called {url[:80]!r}")
        self._relays[url] = self._reachable[url]
        self._relays[url].attach(self)

    async def listen_to(self, depth: int) -> None:
        self.topic = tag(self._mesh.topic, self._cell, depth)
        for relay in self._relays.values():
            relay.ask_anew(self)

    async def announce(self, announcement: Announcement) -> None:
        now, text = self._stamps.next(), announcement_text(self._mesh, announcement)
        until = now + math.ceil(announcement.lifetime_s)
        self._announced = Posted("announcement", replace(self._note(text, now), expires_at=until))
        self._sequence = announcement.sequence
        self._post(self._announced)

    async def withdraw(self) -> None:
        self._announced = None
        self._post(Posted("goodbye", self._note(goodbye_text(self._sequence), self._stamps.next())))

    async def send_sealed(self, to: NodeId, payload: bytes) -> None:
        now = int(self._stamps.now())
        text = letter_text(self._mesh, payload, now + 60)
        if not any(relay.serves(self.node) for relay in self._relays.values()):
            raise LinkClosed("no relay is up to carry the message")
        self._post(Posted("sealed", self._note(text, now), to, next(self._serials)))

    def on_relay(self, relay: MemoryRelay) -> None:
        """The relay came or went."""
        up = relay.serves(self.node)
        if self._connected.get(relay.url, False) != up:
            self._connected[relay.url] = up
            self._emit(RelayChanged(relay.url, up))
        if up and self._announced is not None:
            relay.post(self._announced, self)

    def hear(self, posted: Posted) -> None:
        """Called by a relay; the same note from a second relay is not heard again."""
        note = posted.note
        if len(self._relays) > 1:
            if posted.id in self._seen:
                return
            self._seen[posted.id] = None
        if posted.kind == "announcement":
            self._inbox.announcement(note)
        elif posted.kind == "goodbye":
            self._inbox.goodbye(note)
        elif posted.to == self.node:
            seal_id = f"{note.author} {note.created_at} {posted.serial}"
            unsealed = Unsealed(note.author, seal_id, note.content)
            self._inbox.sealed(note, lambda: unsealed)

    def _note(self, content: str, created_at: int) -> Note:
        return Note(self.node, created_at, None, self._topics, content, lambda: True)

    def _post(self, posted: Posted) -> None:
        for relay in self._relays.values():
            relay.post(posted, self)
