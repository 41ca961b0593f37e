"""A bus without sockets, for tests and simulation: the same notes, checks and listeners.

Faults are parameters of the relay: delay, loss, outages; all chance comes from its seed.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

from ..errors import BadConfig, LinkClosed
from ..events import Emit, RelayChanged, ignore
from ..identity import Identity, Mesh
from ..units import NodeId
from .announcement import Announcement
from .base import Listener, RelayStatus, nobody
from .inbox import Inbox, Note, Unsealed
from .letters import announcement_text, letter_text
from .limits import Bounded

_MAX_REMEMBERED = 4096
_serials = itertools.count()


@dataclass(frozen=True, slots=True)
class Posted:
    """A note on its way; `to` is set for a sealed one. `serial` is its id."""

    kind: Literal["announcement", "goodbye", "sealed"]
    note: Note
    to: NodeId | None
    serial: int


class MemoryRelay:
    """Keeps the last announcement of each author and passes everything on.

    `delay_s` of each delivery, `loss` 0..1 of deliveries, `outages` (start_s, stop_s) counted
    from the first bus that attaches. Stopping forgets what was kept, as a killed relay does.
    """

    def __init__(
        self,
        url: str = "memory://relay",
        *,
        delay_s: float = 0.0,
        loss: float = 0.0,
        outages: Sequence[tuple[float, float]] = (),
        seed: int = 0,
    ) -> None:
        self.url, self.up = url, True
        self._delay_s, self._loss, self._outages = delay_s, loss, tuple(outages)
        self._random = random.Random(seed)
        self._buses: list[MemoryBus] = []
        self._kept: dict[NodeId, Posted] = {}

    def attach(self, bus: MemoryBus) -> None:
        self._plan_outages()
        self._buses.append(bus)
        if self.up:
            self._welcome(bus)

    def detach(self, bus: MemoryBus) -> None:
        self._buses.remove(bus)

    def stop(self) -> None:
        """Go down, as when killed."""
        self.up = False
        self._kept.clear()
        for bus in self._buses:
            bus.on_relay(self)

    def start(self) -> None:
        """Come back, empty."""
        self.up = True
        for bus in self._buses:
            self._welcome(bus)

    def post(self, posted: Posted, sender: MemoryBus | None = None) -> None:
        """Take a note from `sender`, who does not get it back."""
        if not self.up:
            return
        if posted.kind == "announcement":
            self._kept[posted.note.author] = posted
        elif posted.kind == "goodbye":
            self._kept.pop(posted.note.author, None)
        for bus in self._buses:
            if bus is not sender:
                self._deliver(posted, bus)

    def _welcome(self, bus: MemoryBus) -> None:
        bus.on_relay(self)
        for posted in list(self._kept.values()):
            self._deliver(posted, bus)

    def _deliver(self, posted: Posted, bus: MemoryBus) -> None:
        if self._random.random() >= self._loss:
            asyncio.get_running_loop().call_later(self._delay_s, self._arrive, posted, bus)

    def _arrive(self, posted: Posted, bus: MemoryBus) -> None:
        if self.up and bus in self._buses:
            bus.hear(posted)

    def _plan_outages(self) -> None:
        loop, outages, self._outages = asyncio.get_running_loop(), self._outages, ()
        for start_s, stop_s in outages:
            loop.call_later(start_s, self.stop)
            loop.call_later(stop_s, self.start)


class MemoryBus:
    """See `Bus`. `reachable` are relays that `add_relay` may find by their URL."""

    def __init__(
        self,
        identity: Identity,
        mesh: Mesh,
        relays: Sequence[MemoryRelay] = (),
        *,
        reachable: Sequence[MemoryRelay] = (),
        lifetime_s: int = 120,
        emit: Emit = ignore,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._mesh, self._node, self._clock, self._emit = mesh, identity.node, clock, emit
        self._wanted = tuple(relay.url for relay in relays)
        self._reachable = {relay.url: relay for relay in (*relays, *reachable)}
        self._lifetime_s = lifetime_s
        self._inbox = Inbox(mesh, identity.node, clock)
        self._seen: Bounded[int, None] = Bounded(_MAX_REMEMBERED)
        self._relays: dict[str, MemoryRelay] = {}
        self._connected: dict[str, bool] = {}
        self._announced: Posted | None = None
        self._stamped = 0

    @property
    def dropped(self) -> Counter[str]:
        return self._inbox.dropped

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(self._relays) or self._wanted

    def status(self) -> list[RelayStatus]:
        return [
            RelayStatus(url, relay.up, 1, "" if relay.up else "no connection")
            for url, relay in self._relays.items()
        ]

    def listen(
        self,
        on_announcement: Callable[[Announcement], None] = nobody,
        on_gone: Callable[[NodeId], None] = nobody,
        on_sealed: Callable[[NodeId, bytes], None] = nobody,
    ) -> None:
        self._inbox.listener = Listener(on_announcement, on_gone, on_sealed)

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

    async def announce(self, announcement: Announcement) -> None:
        now, text = self._stamp(), announcement_text(self._mesh, announcement)
        note = replace(self._note(text, now), expires_at=now + self._lifetime_s)
        self._announced = Posted("announcement", note, None, next(_serials))
        self._post(self._announced)

    async def withdraw(self) -> None:
        self._announced = None
        self._post(Posted("goodbye", self._note("", self._stamp()), None, next(_serials)))

    async def send_sealed(self, to: NodeId, payload: bytes) -> None:
        now = int(self._clock())
        text = letter_text(self._mesh, payload, now + 60)
        if not any(relay.up for relay in self._relays.values()):
            raise LinkClosed("no relay is up to carry the message")
        self._post(Posted("sealed", self._note(text, now), to, next(_serials)))

    def on_relay(self, relay: MemoryRelay) -> None:
        """The relay came or went."""
        if self._connected.get(relay.url, False) != relay.up:
            self._connected[relay.url] = relay.up
            self._emit(RelayChanged(relay.url, relay.up))
        if relay.up and self._announced is not None:
            relay.post(self._announced, self)

    def hear(self, posted: Posted) -> None:
        """Called by a relay; the same note from a second relay is not heard again."""
        note = posted.note
        if posted.serial in self._seen or self._mesh.topic not in note.topics:
            return
        self._seen[posted.serial] = None
        if posted.kind == "announcement":
            self._inbox.announcement(note)
        elif posted.kind == "goodbye":
            self._inbox.goodbye(note)
        elif posted.to == self._node:
            unsealed = Unsealed(note.author, str(posted.serial), note.content)
            self._inbox.sealed(note, lambda: unsealed)

    def _stamp(self) -> int:
        self._stamped = max(int(self._clock()), self._stamped + 1)
        return self._stamped

    def _note(self, content: str, created_at: int) -> Note:
        return Note(self._node, created_at, None, (self._mesh.topic,), content, lambda: True)

    def _post(self, posted: Posted) -> None:
        for relay in self._relays.values():
            relay.post(posted, self)
