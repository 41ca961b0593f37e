"""Connections to Nostr relays: which are up, what goes out to them, what comes in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import anyio
from nostr_sdk import (  # type: ignore[import-untyped]
    AckPolicy,
    Client,
    ClientBuilder,
    ClientNotificationStream,
    Event,
    Filter,
    HandleMonitorNotification,
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

from ..errors import BadConfig
from ..events import Emit, RelayChanged
from ..identity.places import check_relay_url
from .base import MAX_RELAYS, RelayStatus

_MAX_EVENT_BYTES = 80_000
_MAX_TAGS = 32
_CHANNEL = 16_384  # notifications that wait while we are busy; older ones are lost without a sign
_LAST_CALLS_S = 1.0


@dataclass(kw_only=True, frozen=True, slots=True)
class NostrRelaysConfig:
    connect_timeout_s: float = 5.0  # opening waits no longer for the first relay
    ok_timeout_s: float = 1.5  # for a relay's answer, where we want one
    retry_s: float = 2.0  # first pause before a relay is tried again
    backoff: bool = True  # pauses grow up to a minute


@dataclass(slots=True)
class _Link:
    """One relay. It counts as connected once it has been asked for our notes."""

    url: RelayUrl
    relay: Relay
    connected: bool = False
    ended: bool = False
    error: str = ""


class _Watcher(HandleMonitorNotification):  # type: ignore[misc]
    """Told by the library when a relay's status changes."""

    def __init__(self, tell: Callable[[str, Status], None]) -> None:
        super().__init__()
        self._tell = tell

    async def relay_status_changed(self, relay_url: RelayUrl, status: Status) -> None:
        """Nothing may be raised in here, Rust is waiting: the loop makes the call."""
        asyncio.get_running_loop().call_soon(self._tell, str(relay_url), status)


class NostrRelays:
    """`filters` says what to ask a relay for, `on_event` hears what it delivers.

    `kept` is the event that a relay is told whenever it comes up: it may have restarted empty.
    """

    _client: Client  # from opening on

    def __init__(
        self,
        filters: Callable[[], list[Filter]],
        on_event: Callable[[Event], None],
        *,
        config: NostrRelaysConfig,
        emit: Emit,
    ) -> None:
        self._filters, self._on_event = filters, on_event
        self._config, self._emit = config, emit
        self._links: dict[str, _Link] = {}
        self._tasks: set[asyncio.Task[object]] = set()
        self._round = 0  # how often the filters have changed
        self.kept: Event | None = None

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(self._links)

    def status(self) -> list[RelayStatus]:
        return [
            RelayStatus(url, link.connected, link.relay.stats().attempts(), link.error)
            for url, link in self._links.items()
        ]

    async def open(self, urls: Sequence[str]) -> None:
        """Returns once one relay is up, or after the timeout. Raises BadConfig."""
        uniffi_set_event_loop(asyncio.get_running_loop())
        self._up, self._down = asyncio.Event(), asyncio.Event()
        monitor = Monitor(256)
        self._client = _client(monitor)
        self._spawn(self._drain(self._client.notifications()))
        self._spawn(monitor.handle_notifications(_Watcher(self._on_status)))
        try:
            for url in urls:
                await self.add(url)
            if self._links:
                with anyio.move_on_after(self._config.connect_timeout_s):
                    await self._up.wait()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Wait for the library's last call-backs: leaving before them can crash the process."""
        with anyio.CancelScope(shield=True):
            await self._client.shutdown()
            if self._links:
                with anyio.move_on_after(_LAST_CALLS_S):
                    await self._down.wait()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        self._links.clear()

    async def add(self, url: str) -> None:
        """Raises BadConfig when `url` cannot be a relay's. A known or surplus one is left out."""
        try:
            parsed = RelayUrl.parse(check_relay_url(url))
        except (ValueError, NostrSdkError) as error:
            raise BadConfig(
                f"{url[:80]!r} cannot be used as a relay: {error}",
                hint="write it as ws://HOST:PORT or wss://HOST",
            ) from None
        if len(self._links) >= MAX_RELAYS:
            return
        pause = timedelta(seconds=self._config.retry_s)
        options = RelayOptions().retry_interval(pause)
        options = options.adjust_retry_interval(self._config.backoff)
        if await self._client.add_relay(parsed, opts=options):
            self._links[str(parsed)] = _Link(parsed, await self._client.relay(parsed))
            await self._client.connect_relay(parsed)

    async def ask_anew(self) -> None:
        """The filters have changed: every relay that is up is asked again. Under another name:
        one that gets the old name twice may go on as before.
        """
        before, self._round = _subscription(self._round), self._round + 1
        for link in [link for link in self._links.values() if link.connected]:
            await self._ask(link)
        await self._client.unsubscribe(before)

    async def send(self, event: Event, *, wait: bool = False) -> int:
        """To how many relays it went. A frozen one holds us up only if we `wait` for answers."""
        up = [link.url for link in self._links.values() if link.connected]
        return await self._send_to(up, event, wait=wait) if up else 0

    async def _send_to(self, urls: list[RelayUrl], event: Event, *, wait: bool = False) -> int:
        try:
            output = await self._client.send_event(
                event,
                target=SendEventTarget.to(urls),
                ack_policy=AckPolicy.all() if wait else AckPolicy.none(),
                ok_timeout=timedelta(seconds=self._config.ok_timeout_s),
            )
        except NostrSdkError as error:
            for url in urls:
                self._note_error(str(url), str(error))
            return 0
        for url, text in output.failed.items():
            self._note_error(str(url), text)
        return len(output.success)

    def _note_error(self, url: str, error: str) -> None:
        if link := self._links.get(url):
            link.error = error[:200]

    def _on_status(self, url: str, status: Status) -> None:
        link = self._links.get(url)
        if link is None:
            return
        if status == Status.CONNECTED:
            self._spawn(self._greet(link))
        elif link.connected:
            link.error = "the connection ended"
            self._set_connected(link, connected=False)
        elif status == Status.DISCONNECTED:
            link.error = link.error or "no connection"
        link.ended = status in (Status.SHUTDOWN, Status.TERMINATED, Status.BANNED)
        if all(other.ended for other in self._links.values()):
            self._down.set()

    async def _greet(self, link: _Link) -> None:
        """Ask a relay that came up for our notes, and tell it ours."""
        if not await self._ask(link):
            return
        if self.kept is not None:
            await self._send_to([link.url], self.kept)
        if link.relay.status() == Status.CONNECTED and not link.connected:
            link.error = ""
            self._set_connected(link, connected=True)
            self._up.set()

    async def _ask(self, link: _Link) -> bool:
        """Subscribe; an earlier subscription is replaced."""
        try:
            wanted = ReqTarget.single(link.url, self._filters())
            await self._client.subscribe(wanted, id=_subscription(self._round))
        except NostrSdkError as error:
            link.error = str(error)[:200]
            return False
        return True

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
                loop.call_soon(self._on_event, notification.event)
            elif notification.is_MESSAGE():
                self._hear_answer(str(notification.relay_url), notification.message.as_enum())

    def _hear_answer(self, url: str, message: RelayMessageEnum) -> None:
        if message.is_OK():
            self._note_error(url, "" if message.status else message.message)


def _subscription(number: int) -> str:
    return f"shoal{number}"


def _client(monitor: Monitor) -> Client:
    limits = RelayLimits().event_max_size(_MAX_EVENT_BYTES).event_max_num_tags(_MAX_TAGS)
    builder = ClientBuilder().monitor(monitor).relay_limits(limits)
    return builder.notification_channel_size(_CHANNEL).build()
