"""The in-memory twin of a network: same links, with delay, jitter, loss and outages as parameters.

It behaves as TCP would: bytes are neither lost nor reordered. What is "lost" arrives later by one
retransmission and holds up all that is behind it. Bytes go through the same framing as elsewhere.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from dataclasses import dataclass

from ..errors import BadProof, LinkClosed
from ..identity import Identity
from ..units import NodeId
from .base import Admit, Contact, Link, OnFault, OnLink
from .frames import Bytes
from .link import LinkConfig, WireLink

_SCHEME = "memory:"
_WINDOW_BYTES = 1 << 20  # on the way, in one direction, before the writer has to wait


@dataclass(kw_only=True, frozen=True, slots=True)
class MemoryConfig:
    delay_s: float = 0.0  # one way
    jitter_s: float = 0.0  # added to the delay, evenly distributed
    loss: float = 0.0  # share of writes that have to be sent again
    resend_s: float = 0.2  # what sending again costs
    bytes_per_s: float = 0.0  # 0 = unlimited
    dial_s: float = 5.0  # until a dial into silence is given up
    link: LinkConfig = LinkConfig()


def address_of(node: NodeId) -> str:
    return f"{_SCHEME}{node}"


class MemoryNetwork:
    """All nodes of one process. The same seed gives the same delays and losses."""

    def __init__(self, config: MemoryConfig | None = None, *, seed: int = 0) -> None:
        self.config = config or MemoryConfig()
        self.chance = random.Random(seed)
        self._listening: dict[NodeId, MemoryCarrier] = {}
        self._cut: set[frozenset[NodeId]] = set()
        self._frozen: set[NodeId] = set()
        self._lanes: set[_Lane] = set()

    def carrier(self, identity: Identity) -> MemoryCarrier:
        return MemoryCarrier(self, identity)

    def cut(self, a: NodeId, b: NodeId | None = None) -> None:
        """Break the links between `a` and `b`, or all of `a`, with an error at both ends."""
        self._cut.add(frozenset((a, b) if b is not None else (a,)))
        for lane in list(self._lanes):
            if self.is_cut(lane.sender, lane.receiver):
                lane.break_off("the network was cut")

    def freeze(self, node: NodeId) -> None:
        """Nothing reaches the node and nothing leaves it; nobody gets an error."""
        self._frozen.add(node)

    def heal(self) -> None:
        """Undo every cut and freeze. Bytes that a freeze held up arrive now."""
        self._cut.clear()
        self._frozen.clear()
        for lane in list(self._lanes):
            lane.flush()

    def is_cut(self, a: NodeId, b: NodeId) -> bool:
        return not self._cut.isdisjoint({frozenset((a, b)), frozenset((a,)), frozenset((b,))})

    def is_silent(self, a: NodeId, b: NodeId) -> bool:
        return a in self._frozen or b in self._frozen

    def delay_s(self) -> float:
        """How long one write is on its way, without what bandwidth adds."""
        config = self.config
        delay_s = config.delay_s + self.chance.random() * config.jitter_s
        while self.chance.random() < config.loss:
            delay_s += config.resend_s
        return delay_s

    def connect(self, dialing: MemoryCarrier, accepting: MemoryCarrier) -> tuple[_Wire, _Wire]:
        """Two ends of a new stream."""
        there = _Lane(self, dialing.identity.node, accepting.identity.node)
        back = _Lane(self, accepting.identity.node, dialing.identity.node)
        near, far = _Wire(there, back), _Wire(back, there)
        there.ends, back.ends = (near, far), (far, near)
        self._lanes |= {there, back}
        return near, far

    def register(self, carrier: MemoryCarrier) -> None:
        self._listening[carrier.identity.node] = carrier

    def find(self, address: str) -> MemoryCarrier | None:
        return self._listening.get(NodeId(address.removeprefix(_SCHEME)))

    def forget_carrier(self, carrier: MemoryCarrier) -> None:
        self._listening.pop(carrier.identity.node, None)

    def forget_lane(self, lane: _Lane) -> None:
        self._lanes.discard(lane)


class MemoryCarrier:
    """One node's access to a `MemoryNetwork`; its address is ``memory:`` and the node id."""

    name = "memory"

    def __init__(self, network: MemoryNetwork, identity: Identity) -> None:
        self.identity = identity
        self._network = network
        self._callbacks: tuple[OnLink, Admit] | None = None

    async def listen(self, on_link: OnLink, admit: Admit, on_fault: OnFault) -> tuple[str, ...]:
        self._callbacks = on_link, admit
        self._network.register(self)
        return (address_of(self.identity.node),)

    async def dial(self, contact: Contact) -> Link:
        found = [self._network.find(address) for address in contact.addresses]
        for carrier in found:
            if carrier is not None:
                return await self._call(carrier, contact)
        raise LinkClosed("nobody listens at these addresses")

    async def aclose(self) -> None:
        self._network.forget_carrier(self)

    async def _call(self, carrier: MemoryCarrier, contact: Contact) -> Link:
        ours, theirs = self.identity.node, carrier.identity.node
        if self._network.is_cut(ours, theirs):
            raise LinkClosed("the network is cut")
        if self._network.is_silent(ours, theirs):
            await asyncio.sleep(self._network.config.dial_s)
            raise LinkClosed("no answer")
        await asyncio.sleep(2 * self._network.delay_s())
        if carrier.identity.transport_key != contact.transport_key or theirs != contact.node:
            raise BadProof("another node answered")
        return self._link_with(carrier)

    def _link_with(self, carrier: MemoryCarrier) -> Link:
        """Both cards are taken at their word: in one process nobody pretends."""
        if carrier._callbacks is None:
            raise LinkClosed("nobody listens at this address")
        on_link, admit = carrier._callbacks
        if not admit(self.identity.node):
            raise LinkClosed("the other node does not admit us")
        near, far = self._network.connect(self, carrier)
        on_link(self._link(far, self.identity))
        return self._link(near, carrier.identity)

    def _link(self, wire: _Wire, peer: Identity) -> WireLink:
        clock = asyncio.get_running_loop().time
        link = WireLink(wire, peer.card, config=self._network.config.link, clock=clock)
        wire.link = link
        return link


class _Lane:
    """One direction of a stream: bytes wait here for their time, in order. None is its end."""

    ends: tuple[_Wire, _Wire]  # writer, reader

    def __init__(self, network: MemoryNetwork, sender: NodeId, receiver: NodeId) -> None:
        self.sender, self.receiver = sender, receiver
        self._network = network
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[bytes | None] = deque()
        self._due = 0  # so many of those have arrived and may be read
        self._last_arrival = self._loop.time()
        self._bytes = 0

    def carry(self, data: bytes | None) -> None:
        config = self._network.config
        size = len(data or b"")
        sending_s = size / config.bytes_per_s if config.bytes_per_s else 0.0
        earliest = self._loop.time() + self._network.delay_s()
        self._last_arrival = max(self._last_arrival, earliest) + sending_s
        self._waiting.append(data)
        self._bytes += size
        if self._last_arrival <= self._loop.time():
            self._loop.call_soon(self._arrive)
        else:
            self._loop.call_at(self._last_arrival, self._arrive)
        if self._bytes >= _WINDOW_BYTES:
            self.ends[0].set_writable(False)

    def _arrive(self) -> None:
        self._due += 1
        self.flush()

    def flush(self) -> None:
        """Hand over what has arrived, as far as the reader reads and the network is up."""
        writer, reader = self.ends
        while self._due and self._waiting and self._may_deliver(reader):
            self._due -= 1
            data = self._waiting.popleft()
            if data is None:
                self.break_off("the connection ended")
                return
            self._bytes -= len(data)
            reader.deliver(data)
            if self._bytes < _WINDOW_BYTES:
                writer.set_writable(True)

    def _may_deliver(self, reader: _Wire) -> bool:
        return reader.reading and not self._network.is_silent(self.sender, self.receiver)

    def break_off(self, why: str) -> None:
        """Both ends learn that the stream has ended, and nothing on the way arrives."""
        self._waiting.clear()
        self._network.forget_lane(self)
        for wire in self.ends:
            self._loop.call_soon(wire.lost, why)


class _Wire:
    """One end of a stream."""

    link: WireLink

    def __init__(self, out: _Lane, back: _Lane) -> None:
        self.reading = False
        self._out, self._back = out, back
        self._ended = False

    def write(self, data: Bytes) -> None:
        if not self._ended:
            self._out.carry(bytes(data))

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True
        self._out._loop.call_soon(self._back.flush)

    def close(self) -> None:
        if not self._ended:
            self._out.carry(None)
            self._ended = True

    def abort(self) -> None:
        if not self._ended:
            self._ended = True
            if not self._out._network.is_silent(self._out.sender, self._out.receiver):
                self._out.break_off("the connection was reset")
                self._back.break_off("the connection was reset")

    # What the lanes call.

    def deliver(self, data: bytes) -> None:
        self.link.bytes_came(data)

    def set_writable(self, writable: bool) -> None:
        self.link.set_writable(writable)

    def lost(self, why: str) -> None:
        self._ended = True
        self.link.wire_lost(LinkClosed(why))
