"""The in-memory twin of a network: same links, with delay, jitter, loss and outages as parameters.

It behaves as TCP would: nothing is lost or reordered on a link. What is "lost" arrives later by one
retransmission and holds up all that is behind it. `memory_link.py` carries the frames.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..errors import BadProof, LinkClosed
from ..identity import Identity
from ..units import NodeId
from .base import Admit, Contact, Link, OnFault, OnLink
from .frames import Frame
from .link import LinkConfig
from .memory_link import Lane, MemoryLink, Path, Pipe

__all__ = ["MemoryCarrier", "MemoryConfig", "MemoryNetwork", "Path", "Pipe", "address_of"]

_SUFFIX = ".memory:1"  # so that announcements take it for an address


@dataclass(kw_only=True, frozen=True, slots=True)
class MemoryConfig:
    """The first five are those of a `Path`, for pairs of nodes that have none of their own."""

    delay_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    resend_s: float = 0.2
    bytes_per_s: float = 0.0
    window_bytes: int = 1 << 20  # under way in one direction before the writer has to wait
    dial_s: float = 5.0  # until a dial into silence is given up
    link: LinkConfig = LinkConfig()

    @property
    def path(self) -> Path:
        return Path(
            delay_s=self.delay_s,
            jitter_s=self.jitter_s,
            loss=self.loss,
            resend_s=self.resend_s,
            bytes_per_s=self.bytes_per_s,
        )


def address_of(node: NodeId) -> str:
    return f"{node}{_SUFFIX}"


def nothing_more(frame: Frame) -> int:
    """A frame weighs what it is."""
    return 0


class MemoryNetwork:
    """All nodes of one process. The same seed gives the same delays and losses.

    paths   the way from one node to another, asked once for each link; None = as in the config
    weigh   how many bytes a frame stands for beside its own, where a simulator sends small ones
    """

    def __init__(
        self,
        config: MemoryConfig | None = None,
        *,
        seed: int = 0,
        paths: Callable[[NodeId, NodeId], Path | None] = lambda a, b: None,
        weigh: Callable[[Frame], int] = nothing_more,
    ) -> None:
        self.config = config or MemoryConfig()
        self.chance = random.Random(seed)
        self.window_bytes = self.config.window_bytes
        self.weigh, self._paths, self._usual = weigh, paths, self.config.path
        self.sent: Counter[tuple[NodeId, NodeId]] = Counter()  # bytes, weight included
        self._listening: dict[NodeId, MemoryCarrier] = {}
        self._lost: dict[NodeId, None] = {}  # machines that were switched off
        self._cut: set[frozenset[NodeId]] = set()
        self._frozen: set[NodeId] = set()
        self._silenced: set[tuple[NodeId, NodeId]] = set()  # from, to
        self._groups: dict[NodeId, int] = {}
        self._lanes: dict[Lane, None] = {}

    def carrier(self, identity: Identity) -> MemoryCarrier:
        return MemoryCarrier(self, identity)

    # ---- faults

    def cut(self, a: NodeId, b: NodeId | None = None) -> None:
        """Break the links between `a` and `b`, or all of `a`, with an error at both ends."""
        self._cut.add(frozenset((a, b) if b is not None else (a,)))
        for lane in list(self._lanes):
            if self.is_cut(lane.sender, lane.receiver):
                lane.break_off("the network was cut")

    def freeze(self, node: NodeId) -> None:
        """Nothing reaches the node and nothing leaves it; nobody gets an error."""
        self._frozen.add(node)

    def silence(self, a: NodeId, b: NodeId) -> None:
        """Nothing gets from `a` to `b` any more; the other direction works on."""
        self._silenced.add((a, b))

    def partition(self, *groups: Iterable[NodeId]) -> None:
        """Nothing gets from one of these groups to another; nodes of none reach all."""
        self._groups = {node: at for at, group in enumerate(groups) for node in group}

    def kill(self, node: NodeId, *, silently: bool = False) -> None:
        """Its process has ended: what it has not sent is lost and the others' links break. When it
        goes `silently`, as a machine without power, nobody gets an error.
        """
        self._listening.pop(node, None)
        if silently:
            self._lost[node] = None
        for lane in list(self._lanes):
            if lane.receiver == node or (lane.sender == node and silently):
                lane.drop()
            elif lane.sender == node:
                lane.end("the connection was reset")

    def heal(self) -> None:
        """Undo every cut, freeze, silence and partition. What they held up arrives now."""
        for faults in (self._cut, self._frozen, self._silenced, self._groups):
            faults.clear()
        self._flush()

    def thaw(self, node: NodeId) -> None:
        """Undo a freeze, or what was silenced from and to this node."""
        self._frozen.discard(node)
        self._silenced = {pair for pair in self._silenced if node not in pair}
        self._flush()

    def reunite(self) -> None:
        """Undo a partition."""
        self._groups.clear()
        self._flush()

    def _flush(self) -> None:
        for lane in list(self._lanes):
            lane.flush_soon()

    def is_cut(self, a: NodeId, b: NodeId) -> bool:
        pairs = {frozenset((a, b)), frozenset((a,)), frozenset((b,))}
        return bool(self._cut) and not self._cut.isdisjoint(pairs)

    def is_silent(self, a: NodeId, b: NodeId) -> bool:
        """Nothing gets from `a` to `b`, and nobody is told."""
        groups = self._groups
        if groups and a in groups and b in groups and groups[a] != groups[b]:
            return True
        return a in self._frozen or b in self._frozen or (a, b) in self._silenced

    # ---- what links need

    def path(self, a: NodeId, b: NodeId) -> Path:
        return self._paths(a, b) or self._usual

    def delay_s(self, path: Path) -> float:
        """How long one piece is under way, without what bandwidth adds."""
        delay_s = path.delay_s
        if path.jitter_s:
            delay_s += self.chance.random() * path.jitter_s
        while path.loss and self.chance.random() < path.loss:
            delay_s += path.resend_s
        return delay_s

    def carried(self, a: NodeId, b: NodeId, count: int) -> None:
        self.sent[a, b] += count

    def forget(self, lane: Lane) -> None:
        self._lanes.pop(lane, None)

    def connect(self, dialing: MemoryCarrier, accepting: MemoryCarrier) -> tuple[Link, Link]:
        """Two ends of a new stream. Both cards are taken at their word: in one process nobody
        pretends.
        """
        a, b = dialing.identity, accepting.identity
        there = Lane(self, a.node, b.node, self.path(a.node, b.node), accepting.context)
        back = Lane(self, b.node, a.node, self.path(b.node, a.node), dialing.context)
        clock, config = asyncio.get_running_loop().time, self.config.link
        near = MemoryLink(b.card, there, back, self, config=config, clock=clock)
        far = MemoryLink(a.card, back, there, self, config=config, clock=clock)
        there.writer, there.reader, back.writer, back.reader = near, far, far, near
        self._lanes |= {there: None, back: None}
        return near, far

    def register(self, carrier: MemoryCarrier) -> None:
        self._lost.pop(carrier.identity.node, None)
        self._listening[carrier.identity.node] = carrier

    def find(self, address: str) -> MemoryCarrier | None:
        return self._listening.get(NodeId(address.removesuffix(_SUFFIX)))

    def is_lost(self, node: NodeId) -> bool:
        """It does not even refuse."""
        return node in self._lost

    def forget_carrier(self, carrier: MemoryCarrier) -> None:
        if self._listening.get(carrier.identity.node) is carrier:
            del self._listening[carrier.identity.node]


class MemoryCarrier:
    """One node's access to a `MemoryNetwork`; its address is the node id and ``.memory``. What its
    links do is done in the context in which it was made.
    """

    name = "memory"

    def __init__(self, network: MemoryNetwork, identity: Identity) -> None:
        self.identity = identity
        self.context = contextvars.copy_context()
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
        if self._network.is_lost(contact.node):
            await self._no_answer()
        raise LinkClosed("nobody listens at these addresses")

    async def aclose(self) -> None:
        self._network.forget_carrier(self)

    async def _no_answer(self) -> None:
        await asyncio.sleep(self._network.config.dial_s)
        raise LinkClosed("no answer")

    async def _call(self, carrier: MemoryCarrier, contact: Contact) -> Link:
        """Three ways: there, back with the proof, and there again with ours and the first frame."""
        network, ours, theirs = self._network, self.identity.node, carrier.identity.node
        if network.is_cut(ours, theirs):
            raise LinkClosed("the network is cut")
        if network.is_silent(ours, theirs) or network.is_silent(theirs, ours):
            await self._no_answer()
        there, back = network.path(ours, theirs), network.path(theirs, ours)
        await asyncio.sleep(network.delay_s(there) + network.delay_s(back))
        if carrier.identity.transport_key != contact.transport_key or theirs != contact.node:
            raise BadProof("another node answered")
        if carrier._callbacks is None or network.find(address_of(theirs)) is not carrier:
            raise LinkClosed("nobody listens at this address")
        on_link, admit = carrier._callbacks
        if not admit(ours):
            raise LinkClosed("the other node does not admit us")
        near, far = network.connect(self, carrier)
        asyncio.get_running_loop().call_soon(on_link, far, context=carrier.context)
        return near
