"""The bus over Nostr relays: several at once, whichever of them are up."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

from nostr_sdk import Event, Filter, Keys, NostrSdkError  # type: ignore[import-untyped]

from ..errors import LinkClosed
from ..events import Emit, ignore
from ..identity import Identity, Mesh
from ..units import NodeId
from .announcement import Announcement
from .base import Listener, RelayStatus, nobody
from .cells import tags
from .inbox import Inbox
from .letters import announcement_text, goodbye_text, letter_text
from .nostr_events import (
    ANNOUNCEMENT,
    GOODBYE,
    WRAP,
    announcement_event,
    filters,
    goodbye_event,
    is_goodbye,
    note_of,
    unseal,
    wrap_event,
)
from .nostr_relays import NostrRelays, NostrRelaysConfig


@dataclass(kw_only=True, frozen=True, slots=True)
class NostrBusConfig(NostrRelaysConfig):
    letter_s: int = 60  # how long a sealed message may be read


class NostrBus:
    """See `Bus`. `emit` is told when relays come and go. One event loop a process."""

    def __init__(
        self,
        identity: Identity,
        mesh: Mesh,
        relays: Sequence[str] = (),
        *,
        config: NostrBusConfig | None = None,
        emit: Emit = ignore,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._mesh, self._node = mesh, identity.node
        self._topics, self._depth = tags(mesh.topic, identity.node), 0
        self._keys = Keys.parse(identity.nostr_secret().hex())
        self._config = config or NostrBusConfig()
        self._wanted = tuple(relays)
        self._relays = NostrRelays(self._filters, self._hear, config=self._config, emit=emit)
        self._inbox = Inbox(mesh, identity.node, clock)
        self._stamps = self._inbox.stamps
        self._sequence = 0  # of our last announcement

    @property
    def dropped(self) -> Counter[str]:
        return self._inbox.dropped

    @property
    def urls(self) -> tuple[str, ...]:
        return self._relays.urls or self._wanted

    def status(self) -> list[RelayStatus]:
        return self._relays.status()

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
        await self._relays.open(self._wanted)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._relays.close()

    async def add_relay(self, url: str) -> None:
        await self._relays.add(url)

    async def listen_to(self, depth: int) -> None:
        self._depth = depth
        await self._relays.ask_anew()

    async def announce(self, announcement: Announcement) -> None:
        text, now = announcement_text(self._mesh, announcement), self._stamps.next()
        self._relays.kept = announcement_event(
            self._keys,
            self._topics,
            text,
            created_at=now,
            expires_at=now + math.ceil(announcement.lifetime_s),
            era=self._stamps.era,
        )
        self._sequence = announcement.sequence
        await self._relays.send(self._relays.kept)

    async def withdraw(self) -> None:
        self._relays.kept = None
        text, now, era = goodbye_text(self._sequence), self._stamps.next(), self._stamps.era
        goodbye = goodbye_event(self._keys, self._topics, text, created_at=now, era=era)
        await self._relays.send(goodbye, wait=True)  # we may be about to leave

    async def send_sealed(self, to: NodeId, payload: bytes) -> None:
        now = int(self._stamps.now())
        until = now + self._config.letter_s
        text = letter_text(self._mesh, payload, until)
        wrap = wrap_event(self._keys, to, text, created_at=now, expires_at=until)
        if not await self._relays.send(wrap):
            raise LinkClosed(
                "no relay is connected to carry the message", hint="see `shoal status`"
            )

    def _filters(self) -> list[Filter]:
        return filters(self._mesh.topic, self._node, int(self._stamps.now()), self._depth)

    def _hear(self, event: Event) -> None:
        try:
            kind, note = event.kind().as_u16(), note_of(event)
            goodbye = kind == GOODBYE and is_goodbye(event)
        except (ValueError, NostrSdkError):
            self._inbox.drop("malformed")
            return
        if kind == ANNOUNCEMENT:
            self._inbox.announcement(note)
        elif goodbye:
            self._inbox.goodbye(note)
        elif kind == WRAP:
            self._inbox.sealed(note, partial(unseal, self._keys, event))
        else:
            self._inbox.drop("not asked for")
