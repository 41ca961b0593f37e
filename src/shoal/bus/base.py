"""The interface of a bus, and what its listeners are told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self

from ..units import NodeId
from .announcement import Announcement

MAX_PAYLOAD_BYTES = 16 << 10  # of a sealed message; relays take events up to 64 KiB
MAX_RELAYS = 16
MAX_KEPT = 500  # of the notes that a relay keeps we ask for so many, the newest: most give no more


@dataclass(frozen=True, slots=True)
class RelayStatus:
    """`error` is the last thing that went wrong with this relay, or ""."""

    url: str
    connected: bool
    attempts: int
    error: str


def nobody(*_: object) -> None:
    """A listener that does not care."""


@dataclass(frozen=True, slots=True)
class Listener:
    """Called on the event loop, for what has passed every check. A callback must not block."""

    on_announcement: Callable[[Announcement], None] = nobody
    on_gone: Callable[[NodeId], None] = nobody
    on_sealed: Callable[[NodeId, bytes], None] = nobody  # sender, payload
    on_clock: Callable[[float], None] = nobody  # seconds that our clock is behind the others'


class Bus(Protocol):
    """Lossy, unordered, shared with strangers: nothing here is acknowledged end to end.

    Entering connects to all relays and returns once one is up, or after a timeout: a relay
    that is down only shows in `status`. Those who come late are told what is still valid.
    Our own announcements are not told to ourselves.
    """

    @property
    def dropped(self) -> Counter[str]:
        """What arrived and was not handed on, by reason."""

    def listen(
        self,
        on_announcement: Callable[[Announcement], None] = nobody,
        on_gone: Callable[[NodeId], None] = nobody,
        on_sealed: Callable[[NodeId, bytes], None] = nobody,
        on_clock: Callable[[float], None] = nobody,
    ) -> None:
        """Set the callbacks; call before entering."""

    def now(self) -> float:
        """Unix seconds, corrected when what others say shows that our clock is wrong."""

    @property
    def offset_s(self) -> float:
        """The correction: so far is our clock behind."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exc: object) -> None: ...

    async def announce(self, announcement: Announcement) -> None:
        """Replace our announcement everywhere; relays that return or are added get it too.

        It runs out after its `lifetime_s`: the caller announces again before that.
        """

    async def listen_to(self, depth: int) -> None:
        """Hear the announcements of our cell of that depth only (see `cells.py`); at first the
        whole mesh, depth 0. What relays keep of that cell is told again, up to a few hundred.
        """

    async def withdraw(self) -> None:
        """Say goodbye: the others see us gone at once."""

    async def send_sealed(self, to: NodeId, payload: bytes) -> None:
        """Send up to MAX_PAYLOAD_BYTES that only `to` can read, if it listens now.

        Raises InvalidRequest when it is too large, LinkClosed when no relay took it.
        """

    async def add_relay(self, url: str) -> None:
        """Use one more relay; a known or surplus one changes nothing. Raises BadConfig."""

    def status(self) -> list[RelayStatus]:
        """Every relay, as of now."""

    @property
    def urls(self) -> tuple[str, ...]:
        """The relays that we use, up or down."""
