"""The bus over Nostr relays: several at once, whichever of them are up."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Self

import anyio
from nostr_sdk import (  # type: ignore[import-untyped]
    AckPolicy,
    Client,
    ClientBuilder,
    ClientNotificationStream,
    Event,
    HandleMonitorNotification,
    Keys,
    Monitor,
    NostrSdkError,
    Relay,
    RelayLimits,
    RelayMessageEnum,
    RelayOptions,
    RelayUrl,
    ReqTarget,
    SendEventTarget,
)
from nostr_sdk import RelayStatus as Status
from nostr_sdk.nostr_sdk import uniffi_set_event_loop  # type: ignore[import-untyped]

from ..errors import BadConfig, LinkClosed
from ..events import Emit, RelayChanged, ignore
from ..identity import Identity, Mesh
from ..identity.places import check_relay_url
from ..units import NodeId
from .announcement import Announcement
from .base import MAX_RELAYS, Listener, RelayStatus, nobody
from .inbox import Inbox
from .letters import announcement_text, letter_text
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

_SUBSCRIPTION = "shoal"
_MAX_EVENT_BYTES = 80_000
_MAX_TAGS = 32
_CHANNEL = 16_384  # notifications that wait while we are busy; older ones are lost without a sign


@dataclass(kw_only=True, frozen=True, slots=True)
class NostrBusConfig:
    lifetime_s: int = 120  # of an announcement
    letter_s: int = 60  # how long a sealed message may be read
    connect_timeout_s: float = 5.0  # entering waits no longer for the first relay
    ok_timeout_s: float = 1.5  # for a relay's answer, where we want one
    retry_s: float = 2.0  # first pause before a relay is tried again
    backoff: bool = True  # pauses grow up to a minute


@dataclass(slots=True)
class _Link:
    """What we know of one relay."""

    url: RelayUrl
    relay: Relay
    connected: bool = False
    error: str = ""
    ended: bool = False


class _Watcher(HandleMonitorNotification):  # type: ignore[misc]
    """Told by the library when a relay's status changes."""

    def __init__(self, tell: Callable[[str, Status], None]) -> None:
        super().__init__()
        self._tell = tell

    async def relay_status_changed(self, relay_url: RelayUrl, status: Status) -> None:
        """Nothing may be raised in here, Rust is waiting: the loop makes the call."""
        asyncio.get_running_loop().call_soon(self._tell, str(relay_url), status)


class NostrBus:
    """See `Bus`. `emit` is told when relays come and go. One event loop a process."""

    _client: Client  # from entering on

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
        self._mesh, self._node, self._clock, self._emit = mesh, identity.node, clock, emit
        self._keys = Keys.parse(identity.nostr_secret().hex())
        self._wanted = tuple(relays)
        self._config = config or NostrBusConfig()
        self._inbox = Inbox(mesh, identity.node, clock)
        self._links: dict[str, _Link] = {}
        self._tasks: set[asyncio.Task[object]] = set()
        self._announced: Event | None = None
        self._stamped = 0

    @property
    def dropped(self) -> Counter[str]:
        return self._inbox.dropped

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(self._links) or self._wanted

    def status(self) -> list[RelayStatus]:
        return [
            RelayStatus(url, link.connected, link.relay.stats().attempts(), link.error)
            for url, link in self._links.items()
        ]

    def listen(
        self,
        on_announcement: Callable[[Announcement], None] = nobody,
        on_gone: Callable[[NodeId], None] = nobody,
        on_sealed: Callable[[NodeId, bytes], None] = nobody,
    ) -> None:
        self._inbox.listener = Listener(on_announcement, on_gone, on_sealed)

    async def __aenter__(self) -> Self:
        uniffi_set_event_loop(asyncio.get_running_loop())
        self._up, self._down = asyncio.Event(), asyncio.Event()
        monitor = Monitor(256)
        self._client = _client(monitor)
        self._spawn(self._drain(self._client.notifications()))
        self._spawn(monitor.handle_notifications(_Watcher(self._on_status)))
        try:
            for url in self._wanted:
                await self.add_relay(url)
            if self._links:
                with anyio.move_on_after(self._config.connect_timeout_s):
                    await self._up.wait()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Wait for the library's last call-backs: leaving before them can crash the process."""
        with anyio.CancelScope(shield=True):
            await self._client.shutdown()
            if self._links:
                with anyio.move_on_after(1):
                    await self._down.wait()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        self._links.clear()

    async def add_relay(self, url: str) -> None:
        try:
            parsed = RelayUrl.parse(check_relay_url(url))
        except (ValueError, NostrSdkError) as error:
            raise BadConfig(
                f"{url[:80]!r} cannot be used as a relay: {error}",
                hint="write it as ws://HOST:PORT or wss://HOST",
            ) from None
        if str(parsed) in self._links or len(self._links) >= MAX_RELAYS:
            return
        await self._client.add_relay(parsed, opts=self._options())
        self._links[str(parsed)] = _Link(parsed, await self._client.relay(parsed))
        await self._client.connect_relay(parsed)

    async def announce(self, announcement: Announcement) -> None:
        text = announcement_text(self._mesh, announcement)
        now = self._stamp()
        self._announced = announcement_event(
            self._keys,
            self._mesh.topic,
            text,
            created_at=now,
            expires_at=now + self._config.lifetime_s,
        )
        await self._send(self._announced)

    async def withdraw(self) -> None:
        self._announced = None
        goodbye = goodbye_event(self._keys, self._mesh.topic, created_at=self._stamp())
        await self._send(goodbye, AckPolicy.all())  # we may be about to leave

    async def send_sealed(self, to: NodeId, payload: bytes) -> None:
        now = int(self._clock())
        until = now + self._config.letter_s
        text = letter_text(self._mesh, payload, until)
        wrap = wrap_event(self._keys, to, text, created_at=now, expires_at=until)
        if not await self._send(wrap):
            raise LinkClosed(
                "no relay is connected to carry the message", hint="see `shoal status`"
            )

    def _stamp(self) -> int:
        """Relays keep the lower id of two events of one second: never use a second twice."""
        self._stamped = max(int(self._clock()), self._stamped + 1)
        return self._stamped

    async def _send(self, event: Event, ack: AckPolicy | None = None) -> int:
        """How many relays it went to. A frozen one does not hold us up unless `ack` says so."""
        up = [link.url for link in self._links.values() if link.connected]
        return await self._send_to(up, event, ack or AckPolicy.none()) if up else 0

    async def _send_to(self, urls: list[RelayUrl], event: Event, ack: AckPolicy) -> int:
        output = await self._client.send_event(
            event,
            target=SendEventTarget.to(urls),
            ack_policy=ack,
            ok_timeout=timedelta(seconds=self._config.ok_timeout_s),
        )
        for url, error in output.failed.items():
            self._note_error(str(url), error)
        return len(output.success)

    def _note_error(self, url: str, error: str) -> None:
        if link := self._links.get(url):
            link.error = error[:200]

    def _on_status(self, url: str, status: Status) -> None:
        link = self._links.get(url)
        if link is None:
            return
        if status in (Status.SHUTDOWN, Status.TERMINATED, Status.BANNED):
            link.ended = True
            if all(link.ended for link in self._links.values()):
                self._down.set()
        if status == Status.CONNECTED:
            self._spawn(self._greet(link))
        elif link.connected:
            self._set_connected(link, connected=False)
            link.error = "the connection ended"
        elif status == Status.DISCONNECTED:
            link.error = link.error or "no connection"

    async def _greet(self, link: _Link) -> None:
        """Ask a relay that came up for our notes; it may have restarted empty, so tell it ours."""
        wanted = filters(self._mesh.topic, self._node, int(self._clock()))
        await self._client.subscribe(ReqTarget.single(link.url, wanted), id=_SUBSCRIPTION)
        if self._announced is not None:
            await self._send_to([link.url], self._announced, AckPolicy.none())
        if link.relay.status() == Status.CONNECTED and not link.connected:
            self._set_connected(link, connected=True)
            link.error = ""
            self._up.set()

    def _set_connected(self, link: _Link, *, connected: bool) -> None:
        link.connected = connected
        self._emit(RelayChanged(str(link.url), connected))

    def _spawn(self, job: Coroutine[Any, Any, object]) -> None:
        task = asyncio.create_task(job)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _drain(self, stream: ClientNotificationStream) -> None:
        """Take notifications as they come; an error of a listener reaches the loop's handler."""
        loop = asyncio.get_running_loop()
        while (notification := await stream.next()) is not None:
            if notification.is_NEW_EVENT():
                loop.call_soon(self._hear, notification.event)
            elif notification.is_MESSAGE():
                self._hear_answer(str(notification.relay_url), notification.message.as_enum())

    def _hear_answer(self, url: str, message: RelayMessageEnum) -> None:
        if message.is_OK():
            self._note_error(url, "" if message.status else message.message)

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

    def _options(self) -> RelayOptions:
        pause = timedelta(seconds=self._config.retry_s)
        return RelayOptions().retry_interval(pause).adjust_retry_interval(self._config.backoff)


def _client(monitor: Monitor) -> Client:
    limits = RelayLimits().event_max_size(_MAX_EVENT_BYTES).event_max_num_tags(_MAX_TAGS)
    builder = ClientBuilder().monitor(monitor).relay_limits(limits)
    return builder.notification_channel_size(_CHANNEL).build()
