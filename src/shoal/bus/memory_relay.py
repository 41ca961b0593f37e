"""A relay in memory. Its faults are parameters; all chance comes from its seed, and whoever heard a
note first or second is decided by who attached first: the same seed gives the same run.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from ..identity import Mesh
from ..units import NodeId
from .announcement import Announcement
from .base import MAX_KEPT
from .inbox import Note
from .letters import believe_announcement
from .limits import Bounded

_MAX_PROVED = 65_536
_MOMENTS = 8  # that jitter spreads the deliveries of one note over


@dataclass(frozen=True, slots=True)
class Posted:
    """A note on its way; `to` is set for a sealed one. `serial` tells letters apart."""

    kind: Literal["announcement", "goodbye", "sealed"]
    note: Note
    to: NodeId | None = None
    serial: int = 0

    @property
    def id(self) -> tuple[object, ...]:
        note = self.note
        return self.kind, note.author, note.created_at, self.serial, note.content


class Proved:
    """Announcements that were read and proved before: where all nodes are in one process, the same
    proof need not be checked by each of them.
    """

    def __init__(self) -> None:
        self._read: Bounded[tuple[bytes, str], Announcement] = Bounded(_MAX_PROVED)

    def believe(self, mesh: Mesh, text: str) -> Announcement:
        """As `believe_announcement`."""
        key = mesh.secret, text
        known = self._read.get(key)
        if known is None:
            known = self._read[key] = believe_announcement(mesh, text)
        return known


class Attached(Protocol):
    """What a relay needs from a bus. `topic` is what it listens to now."""

    node: NodeId
    topic: str

    def hear(self, posted: Posted) -> None: ...
    def on_relay(self, relay: MemoryRelay) -> None: ...


class MemoryRelay:
    """Keeps the last announcement of each author and passes everything on.

    `delay_s` of each delivery and up to `jitter_s` more, which changes their order; `loss` 0..1 of
    deliveries; `outages` (start_s, stop_s) counted from the first bus that attaches. Stopping
    forgets what was kept, as a killed relay does. `delivered` counts announcements and letters.
    Relays that are given the same `proved` check nothing twice between them.
    """

    def __init__(
        self,
        url: str = "memory://relay",
        *,
        delay_s: float = 0.0,
        jitter_s: float = 0.0,
        loss: float = 0.0,
        outages: Sequence[tuple[float, float]] = (),
        seed: int = 0,
        proved: Proved | None = None,
    ) -> None:
        self.url, self.up = url, True
        self.proved = proved or Proved()
        self.posted, self.delivered = Counter[str](), Counter[str]()
        self._delay_s, self._jitter_s, self._loss = delay_s, jitter_s, loss
        self._outages = tuple(outages)
        self._random = random.Random(seed)
        self._buses: dict[Attached, str] = {}  # with the topic that each listens to
        self._listening: dict[str, dict[Attached, None]] = {}  # by topic; a dict has an order
        self._by_node: dict[NodeId, dict[Attached, None]] = {}
        self._kept: dict[str, dict[NodeId, Posted]] = {}  # by topic, the newest last
        self._cut: set[NodeId] = set()

    def serves(self, node: NodeId) -> bool:
        """It is up, and nothing cuts that node off it."""
        return self.up and node not in self._cut

    def attach(self, bus: Attached) -> None:
        self._plan_outages()
        self._buses[bus] = bus.topic
        self._listening.setdefault(bus.topic, {})[bus] = None
        self._by_node.setdefault(bus.node, {})[bus] = None
        if self.serves(bus.node):
            self._welcome(bus)

    def detach(self, bus: Attached) -> None:
        self._listening[self._buses.pop(bus)].pop(bus)
        self._by_node[bus.node].pop(bus)

    def ask_anew(self, bus: Attached) -> None:
        """It listens to another topic from now on."""
        self._listening[self._buses[bus]].pop(bus)
        self._buses[bus] = bus.topic
        self._listening.setdefault(bus.topic, {})[bus] = None
        if self.serves(bus.node):
            self._tell_kept(bus)

    def stop(self) -> None:
        """Go down, as when killed."""
        self.up = False
        self._kept.clear()
        for bus in list(self._buses):
            bus.on_relay(self)

    def start(self) -> None:
        """Come back, empty."""
        self.up = True
        for bus in list(self._buses):
            if self.serves(bus.node):
                self._welcome(bus)

    def cut(self, *nodes: NodeId) -> None:
        """These cannot reach it, from now on."""
        self._cut.update(nodes)
        for bus in self._of(nodes):
            bus.on_relay(self)

    def heal(self, *nodes: NodeId) -> None:
        """These can again; all of them, when none is named."""
        healed = [node for node in nodes or sorted(self._cut) if node in self._cut]
        self._cut.difference_update(healed)
        for bus in self._of(healed):
            if self.serves(bus.node):
                self._welcome(bus)

    def post(self, posted: Posted, sender: Attached | None = None) -> None:
        """Take a note from `sender`, who does not get it back."""
        if not self.up or (sender is not None and sender.node in self._cut):
            return
        self.posted[posted.kind] += 1
        if posted.to is not None:
            self._send(posted, self._by_node.get(posted.to, ()))
            return
        hearing: list[Attached] = []
        for topic in posted.note.topics:
            self._keep(topic, posted)
            hearing += self._listening.get(topic, ())
        self._send(posted, [bus for bus in hearing if bus is not sender])

    def _keep(self, topic: str, posted: Posted) -> None:
        kept = self._kept.setdefault(topic, {})
        kept.pop(posted.note.author, None)
        if posted.kind == "announcement":
            kept[posted.note.author] = posted

    def _welcome(self, bus: Attached) -> None:
        bus.on_relay(self)
        self._tell_kept(bus)

    def _tell_kept(self, bus: Attached) -> None:
        newest = list(self._kept.get(bus.topic, {}).values())[-MAX_KEPT:]
        loop, survivors = asyncio.get_running_loop(), [one for one in newest if not self._loses()]
        if survivors:
            loop.call_later(self._delay_s, self._tell, survivors, bus)

    def _tell(self, notes: Sequence[Posted], bus: Attached) -> None:
        for posted in notes:
            if posted.note.author != bus.node:
                self._arrive(posted, (bus,))

    def _send(self, posted: Posted, buses: Iterable[Attached]) -> None:
        """In one call for all that it reaches at the same moment."""
        moments: dict[int, list[Attached]] = {}
        for bus in buses:
            if not self._loses():
                moment = self._random.randrange(_MOMENTS) if self._jitter_s else 0
                moments.setdefault(moment, []).append(bus)
        loop = asyncio.get_running_loop()
        for moment, reached in moments.items():
            delay_s = self._delay_s + self._jitter_s * moment / _MOMENTS
            loop.call_later(delay_s, self._arrive, posted, reached)

    def _loses(self) -> bool:
        return self._loss > 0 and self._random.random() < self._loss

    def _arrive(self, posted: Posted, buses: Iterable[Attached]) -> None:
        for bus in buses:
            if bus in self._buses and self.serves(bus.node):
                self.delivered[posted.kind] += 1
                bus.hear(posted)

    def _of(self, nodes: Iterable[NodeId]) -> list[Attached]:
        return [bus for node in nodes for bus in self._by_node.get(node, ())]

    def _plan_outages(self) -> None:
        loop, outages, self._outages = asyncio.get_running_loop(), self._outages, ()
        for start_s, stop_s in outages:
            loop.call_later(start_s, self.stop)
            loop.call_later(stop_s, self.start)
