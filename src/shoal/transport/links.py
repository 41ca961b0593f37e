"""All links of a node: one per peer, dialled on demand, watched, dropped when a peer misbehaves.

The decisions are made elsewhere: `peering.py` which link is the one, `heartbeat.py` who is alive,
`door.py` who stays outside. `peer.py` carries them out for one peer, this file for all.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

from ..errors import BadMessage, LinkClosed, PeerError
from ..events import Emit, LinkLost, LinkUp, PeerFault, ignore
from ..identity import Identity
from ..units import NodeId
from .base import Carrier, Contact, Link
from .door import BanConfig, Bans
from .frames import CONTROL, Frame
from .heartbeat import HeartbeatConfig, check
from .peer import Peer, PeerConfig
from .race import first_success
from .rtt import Probes

Handler = Callable[[NodeId, Frame], None]
LostHandler = Callable[[NodeId, str], None]
RttHandler = Callable[[NodeId, float], None]

_MAX_CULPRITS = 4096


@dataclass(kw_only=True, frozen=True, slots=True)
class LinksConfig:
    heartbeat: HeartbeatConfig = HeartbeatConfig()
    bans: BanConfig = BanConfig()
    peer: PeerConfig = PeerConfig()
    max_peers: int = 512  # with more, nobody else may come in
    max_unfinished_bytes: int = 1 << 30  # of incomplete frames, all peers together
    stagger_s: float = 0.25  # before the next carrier is tried as well


class Links:
    """The node's links. Set the handlers first; ``async with`` starts to listen.

    resolve   where a node may be reached, or None
    admit     may this node, which has proved its identity, have a link with us?
    emit      gets LinkUp, LinkLost and PeerFault
    """

    def __init__(
        self,
        identity: Identity,
        carriers: Sequence[Carrier],
        *,
        resolve: Callable[[NodeId], Contact | None],
        admit: Callable[[NodeId], bool] = lambda node: True,
        emit: Emit = ignore,
        config: LinksConfig | None = None,
    ) -> None:
        self.node = identity.node
        self.addresses: tuple[str, ...] = ()  # to announce; known once we listen
        self.faults: Counter[NodeId | None] = Counter()  # None: never proved who it is
        self._carriers, self._resolve, self._admit, self._emit = carriers, resolve, admit, emit
        self._config = config or LinksConfig()
        self._handlers: dict[int, Handler] = {}
        self._lost_handlers: list[LostHandler] = []
        self._rtt_handlers: list[RttHandler] = []
        self._probes = Probes()
        self._peers: dict[NodeId, Peer] = {}
        self._bans: Bans[NodeId] = Bans(self._config.bans)
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        for carrier in self._carriers:
            self.addresses += await carrier.listen(self._arrived, self._admits, self.blame)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    # For the other folders.

    def on(self, channel: int, handler: Handler) -> None:
        """Frames of that channel go to `handler(node, frame)`.

        A PeerError raised by it is the sender's fault: it costs the link and a ban.
        """
        if channel == CONTROL or channel in self._handlers:
            raise ValueError(f"channel {channel} is taken")
        self._handlers[channel] = handler

    def on_lost(self, handler: LostHandler) -> None:
        """`handler(node, reason)`: frames sent to that node may not have arrived."""
        self._lost_handlers.append(handler)

    def on_rtt(self, handler: RttHandler) -> None:
        """`handler(node, seconds)`: there and back to that node, smoothed, measured once more."""
        self._rtt_handlers.append(handler)

    def rtt(self, node: NodeId) -> float | None:
        """Seconds there and back, of nodes that we have or had a link with; 0 to ourselves."""
        return 0.0 if node == self.node else self._probes.rtt(node)

    def peers(self) -> list[NodeId]:
        """Nodes with a link that can be used, sorted."""
        return sorted(node for node, peer in self._peers.items() if peer.live is not None)

    def is_connected(self, node: NodeId) -> bool:
        """True when a frame to `node` needs no dial; always for ourselves."""
        peer = self._peers.get(node)
        return node == self.node or (peer is not None and peer.live is not None)

    async def connect(self, node: NodeId) -> None:
        """Return when there is a link. Raises LinkClosed with the reasons if there will be none."""
        if node != self.node:
            await self._wanted(node).connect()

    def send(self, node: NodeId, frame: Frame) -> None:
        """Send without waiting; frames to one node arrive in order. Without a link it is dialled.

        What cannot be delivered in the end is reported by `on_lost`. Raises LinkClosed when nobody
        knows where the node is, Overloaded when too much is waiting for it already.
        """
        peer = self._peers.get(node)
        if peer is not None and (link := peer.live) is not None:
            peer.used = True
            link.send(frame)
        elif node == self.node:
            self._loop.call_soon(self._deliver_to_ourselves, frame)
        else:
            self._wanted(node).send_later(frame)

    async def drain(self, node: NodeId) -> None:
        """Return when little is waiting to be sent to `node`. Raises LinkClosed."""
        await self.connect(node)
        peer = self._peers.get(node)
        if peer is not None and (link := peer.live) is not None:
            await link.drain()

    def hold(self, node: NodeId, count: int) -> None:
        """`count` bytes from `node` are kept for later; beyond a bound we stop reading from it."""
        if (peer := self._peers.get(node)) is not None:
            peer.hold(count)

    def release(self, node: NodeId, count: int) -> None:
        """As many bytes have been used up. A new link starts at 0."""
        self.hold(node, -count)

    def drop(self, node: NodeId, reason: str) -> None:
        """End the link with a goodbye; for a node that is no longer admitted."""
        if (peer := self._peers.get(node)) is not None:
            peer.drop(reason)

    def part(self, node: NodeId) -> None:
        """End the link if it has carried nothing: neither side counts that as a loss."""
        if (peer := self._peers.get(node)) is not None:
            peer.part()

    async def aclose(self) -> None:
        """Say goodbye to everybody and stop listening."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for peer in self._peers.values():
            peer.close("the node is shutting down")
        self._peers.clear()
        for carrier in self._carriers:
            await carrier.aclose()

    # What a peer needs, see `peer.Owner`.

    async def dial(self, node: NodeId) -> Link:
        """An authenticated link by any carrier. Raises LinkClosed with all reasons."""
        contact = self._contact(node)
        return await first_success(
            [partial(carrier.dial, contact) for carrier in self._carriers],
            stagger_s=self._config.stagger_s,
            discard=lambda link: link.abort(),
        )

    def deliver(self, node: NodeId, frame: Frame) -> None:
        handler = self._handlers.get(frame.channel)
        if handler is None:
            raise BadMessage(f"nobody listens on channel {frame.channel}")
        handler(node, frame)

    def blame(self, node: NodeId | None, fault: PeerError) -> None:
        """Count a fault; who is known is kept out for a while."""
        self.faults[node] += 1
        if len(self.faults) > _MAX_CULPRITS:
            del self.faults[next(key for key in self.faults if key is not None)]
        if node is not None:
            self._bans.blame(node, fault.penalty, self._loop.time())
        self._emit(PeerFault(node, fault.code, fault.penalty))

    def link_up(self, node: NodeId) -> None:
        if self._timer is None:
            self._plan_beat(self._config.heartbeat.beat_after_s)
        self._probes.fresh(node)
        self._emit(LinkUp(node))

    def link_lost(self, node: NodeId, reason: str) -> None:
        self.link_parted(node, reason)
        self.undelivered(node, reason)

    def link_parted(self, node: NodeId, reason: str) -> None:
        self._probes.ended(node)
        self._emit(LinkLost(node, reason))

    def ponged(self, node: NodeId, stamp: int) -> None:
        seconds = self._probes.answered(node, stamp, self._loop.time())
        if seconds is not None:
            for handler in self._rtt_handlers:
                handler(node, seconds)

    def undelivered(self, node: NodeId, reason: str) -> None:
        for handler in self._lost_handlers:
            handler(node, reason)

    def forget(self, node: NodeId) -> None:
        self._peers.pop(node, None)

    # Who may have a link.

    def _admits(self, node: NodeId) -> bool:
        full = node not in self._peers and len(self._peers) >= self._config.max_peers
        if full or self._closed or node == self.node:
            return False
        return not self._bans.banned(node, self._loop.time()) and self._admit(node)

    def _arrived(self, link: Link) -> None:
        self._peer(link.peer).arrived(link)

    def _peer(self, node: NodeId) -> Peer:
        peer = self._peers.get(node)
        if peer is None:
            peer = Peer(node, self, ours_wins=self.node < node, config=self._config.peer)
            self._peers[node] = peer
        return peer

    def _wanted(self, node: NodeId) -> Peer:
        """The peer, if there is any chance of a link. Raises LinkClosed."""
        if self._closed:
            raise LinkClosed("this node is shutting down")
        if node not in self._peers:
            self._contact(node)
        return self._peer(node)

    def _contact(self, node: NodeId) -> Contact:
        if self._bans.banned(node, self._loop.time()):
            raise LinkClosed(f"{node} misbehaved and is kept out for a while")
        contact = self._resolve(node)
        if contact is None:
            raise LinkClosed(f"nobody knows where {node} can be reached")
        return contact

    def _deliver_to_ourselves(self, frame: Frame) -> None:
        try:
            self.deliver(self.node, frame)
        except PeerError as fault:
            self.blame(self.node, fault)

    # The heartbeat: one timer for all links, none while there are no links.

    def _plan_beat(self, wait_s: float) -> None:
        due = self._loop.time() + wait_s
        self._timer = self._loop.call_at(due, self._beat, due)

    def _beat(self, due: float) -> None:
        now = self._loop.time()
        links = ((peer, peer.live) for peer in self._peers.values())
        pulses = {peer: link.pulse for peer, link in links if link is not None}
        if not pulses:
            self._timer = None
            return
        found = check(pulses, now, max(0.0, now - due), self._config.heartbeat)
        self._plan_beat(found.next_in_s)
        for peer in found.beat:
            peer.beat()
        for peer in found.dead:
            peer.give_up("it fell silent")
        self._measure(list(pulses), now)
        self._bound_unfinished()

    def _measure(self, peers: list[Peer], now: float) -> None:
        for peer in peers:
            if peer.live is not None and (stamp := self._probes.ask(peer.node, now)) is not None:
                peer.ping(stamp)

    def _bound_unfinished(self) -> None:
        """Many peers, each within its limits, must not fill our memory with halves of frames."""
        links = ((peer.live.unfinished_bytes, peer) for peer in self._peers.values() if peer.live)
        kept = sorted(links, key=lambda pair: pair[0])
        total = sum(count for count, _ in kept)
        while total > self._config.max_unfinished_bytes:
            count, peer = kept.pop()
            peer.give_up("it left large frames unfinished")
            total -= count
