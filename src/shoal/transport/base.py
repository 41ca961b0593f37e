"""What every carrier offers: links to nodes that have proved who they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ..errors import PeerError, ShoalError
from ..identity import Card
from ..units import NodeId
from .frames import Frame
from .heartbeat import Pulse

OnFrame = Callable[[Frame], None]
OnLost = Callable[[ShoalError], None]


@dataclass(frozen=True, slots=True)
class Contact:
    """Where a node may be reached and which key must answer there. Addresses are mere hints."""

    node: NodeId
    transport_key: bytes  # Ed25519, 32 bytes
    addresses: tuple[str, ...]  # "host:port", "[v6]:port", or "scheme:..." of another carrier


class Link(Protocol):
    """Whole frames, in order, to and from one node. Nothing is read before `start`."""

    pulse: Pulse

    @property
    def peer(self) -> NodeId: ...

    @property
    def card(self) -> Card: ...

    @property
    def queued_bytes(self) -> int:
        """Accepted by `send`, not yet taken by the carrier."""

    @property
    def unfinished_bytes(self) -> int:
        """Received of a frame that is not complete yet."""

    def start(self, on_frame: OnFrame, on_lost: OnLost) -> None:
        """Begin to deliver. A PeerError raised by `on_frame` ends the link like one of the bytes.

        `on_lost` is called at most once, and never after our own `close` or `abort`: with a
        PeerError when the peer misbehaved, with a LocalError otherwise.
        """

    def send(self, frame: Frame) -> None:
        """Queue a frame. Raises LinkClosed, or Overloaded when the queue is at its hard bound."""

    async def drain(self) -> None:
        """Return when the queue is short again. Raises LinkClosed."""

    def pause(self) -> None:
        """Stop reading, so that the peer has to wait; what was read already is still delivered."""

    def resume(self) -> None: ...

    def close(self) -> None:
        """End it after what the carrier has taken; a queue that has to wait is dropped."""

    def abort(self) -> None:
        """End it at once."""


OnLink = Callable[[Link], None]
Admit = Callable[[NodeId], bool]
OnFault = Callable[[NodeId | None, PeerError], None]


class Carrier(Protocol):
    """One way to carry bytes. It proves identities; whom to admit it is told."""

    @property
    def name(self) -> str: ...

    async def listen(self, on_link: OnLink, admit: Admit, on_fault: OnFault) -> tuple[str, ...]:
        """Accept links until `aclose` and `start` them in `on_link`; the addresses to announce."""

    async def dial(self, contact: Contact) -> Link:
        """A link to exactly that node, or LinkClosed with the reasons."""

    async def aclose(self) -> None: ...
