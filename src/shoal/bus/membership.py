"""Our place in the mesh: what we announce, whom we see, who has gone.

Announces at once when something about us changes, soon when our load has moved a lot, else on a
slow jittered beat, slower in larger meshes. Forgets nodes whose announcement ran out and nodes that
died (`doubts.py`), and listens to no more of the mesh than it takes (`cells.py`).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass

from msgspec.structs import replace

from ..events import ClockSkewed, Emit, NodeGone, NodeSeen
from ..identity import Identity
from ..units import NodeId
from .announcement import Announcement
from .base import Bus, nobody
from .cells import MAX_DEPTH, CellsConfig, Listening
from .doubts import Doubts
from .limits import Bounded
from .load import moved_much
from .view import MAX_NODES, MeshView, same_layout


@dataclass(kw_only=True, frozen=True, slots=True)
class MembershipConfig:
    refresh_s: float = 40.0  # a third of the lifetime: two may be lost
    lifetime_s: float = 120.0
    heard_per_s: float = 2.5  # announcements: with more nodes each speaks less often
    debounce_s: float = 0.05  # several changes in a row make one announcement
    load_s: float = 5.0  # between two announcements that tell of load only; slower likewise
    look_s: float = 0.5  # between two looks whether the load has moved enough for that
    refute_s: float = 1.0  # between two that only say that we live
    cells: CellsConfig = CellsConfig()

    def slower(self, nodes: int) -> float:
        """By how much refreshing is slower in a mesh, or cell, of so many nodes."""
        nodes = min(nodes, self.cells.most)  # more are heard for a while only
        return max(1.0, nodes / self.heard_per_s / self.refresh_s)


def content() -> bool:
    """Nobody needs more of the mesh than is heard."""
    return False


def unknown(node: NodeId) -> bool:
    """Nobody has told us of any link."""
    return False


class Membership:
    """Keeps `view` true: the same object always. `describe` gives our announcement, unsigned;
    what this class knows (`lost`, `lifetime_s`,
    `sent_at`) it adds itself.

    Three attributes may be set by whoever runs us:
    needs_more   the nodes that we hear do not suffice: for a model, for a route. Asked often.
    on_doubt     try to reach that node and call `found`, or `suspect`: we are asked to check
    is_linked    we have a link with that node: then it lives, whatever is said or not said
    """

    needs_more: Callable[[], bool]
    on_doubt: Callable[[NodeId], None]
    is_linked: Callable[[NodeId], bool]

    def __init__(
        self,
        bus: Bus,
        identity: Identity,
        describe: Callable[[int], Announcement],
        *,
        emit: Emit,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        chance: random.Random,
        config: MembershipConfig | None = None,
    ) -> None:
        self.needs_more, self.on_doubt, self.is_linked = content, nobody, unknown
        self.view = MeshView(identity.node)
        self.listening = Listening()
        self._bus, self._identity, self._describe = bus, identity, describe
        self._emit, self._clock, self._chance = emit, clock, chance
        self._config = config or MembershipConfig()
        self._doubts = Doubts(identity.node, self._sequence_of)
        self._wake = asyncio.Event()
        self._listeners: list[Callable[[], None]] = []
        self._changed = self._load_changed = self._named = self._left = False
        self._said: Announcement | None = None  # our last announcement
        self._said_at = self._refresh_at = 0.0
        self._load_at = 0.0  # not before it do we look at our load again
        self._slower = 1.0  # than in a small mesh
        self._deaf_until = 0.0
        # the sequence of the last announcement before a node died
        self._dead: Bounded[NodeId, int] = Bounded(MAX_NODES)
        self._sequence = int(
            wall_clock() * 1000
        )  # so that a restarted node is not older than itself
        bus.listen(self._on_announcement, self._on_gone, on_clock=self._on_clock)

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` after every change of the view's layout."""
        self._listeners.append(listener)

    def changed(self) -> None:
        """Something that we announce is different now."""
        self._changed = True
        self._wake.set()

    def load_changed(self) -> None:
        """Sessions came or went: announced soon, if they are twice or half as many. Cheap."""
        if not self._load_changed:
            self._load_changed = True
            self._wake.set()

    def suspect(self, node: NodeId) -> None:
        """A link to `node` broke and could not be made again. We say so, and if it does not
        announce itself anew within seconds it is gone until it does.
        """
        if self._doubts.lost(node, self._clock(), self._clock() + self._config.lifetime_s):
            self.changed()

    def found(self, node: NodeId) -> None:
        """We have reached it just now, whatever is said."""
        if self._doubts.found(node, self._clock()):
            self.changed()

    def doubtful(self) -> frozenset[NodeId]:
        """Nodes that we or others cannot reach, and that have not refuted it yet: not the first
        choice of a route. The same object until it changes.
        """
        return self._doubts.doubtful

    def ourselves(self) -> Announcement:
        """As the others know us, unless we have something else to say: who decides by what all
        know decides as all.
        """
        now = self._describe(self._sequence)
        return self._said if self._said and same_layout(self._said, now) else now

    async def run(self) -> None:
        """Announce, refresh, forget: forever."""
        self._changed = True
        while True:
            if self._changed:
                await asyncio.sleep(self._config.debounce_s if self._said else 0)
            if self._must_announce(self._clock()):
                await self._announce()
            await self._look_around()
            self._wake.clear()
            await self._sleep(self._next_due() - self._clock())

    async def leave(self) -> None:
        """Say goodbye. What changes about us afterwards is not announced: it would take it back."""
        self._left = True
        await self._bus.withdraw()

    # What is to be done when.

    async def _sleep(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(max(0.0, seconds)):
                await self._wake.wait()
        except TimeoutError:
            pass

    def _must_announce(self, now: float) -> bool:
        if self._changed or self._said is None or now >= self._refresh_at:
            return True
        if self._named and now >= self._said_at + self._config.refute_s:
            return True
        if self._load_changed and now >= self._load_at:
            self._load_changed, self._load_at = False, now + self._config.look_s
            return moved_much(self._said.stages, self._describe(self._sequence).stages)
        return False

    def _next_due(self) -> float:
        """When to look again, unless something happens."""
        config, due = self._config, [self._refresh_at]
        if self._changed:
            due.append(self._clock())
        if self._named:
            due.append(self._said_at + config.refute_s)
        if self._load_changed:
            due.append(self._load_at)
        if self.listening.depth or len(self.view) > config.cells.most:
            due.append(self._clock() + config.cells.settle_s)
        if (doubts_due := self._doubts.due) is not None:
            due.append(doubts_due)
        return min(due)

    async def _announce(self) -> None:
        if self._left:
            self._changed = False
            self._refresh_at = self._clock() + self._config.refresh_s
            return
        config, now = self._config, self._clock()
        slower = self._slower = config.slower(self.view.heard_at(self.listening.depth))
        self._changed = self._named = self._load_changed = False
        self._said_at, self._load_at = now, now + config.load_s * slower
        self._refresh_at = now + config.refresh_s * slower * self._chance.uniform(0.8, 1.2)
        self._sequence += 1
        self._said = replace(
            self._describe(self._sequence),
            lost=self._doubts.ours(now),
            lifetime_s=config.lifetime_s * slower,
            sent_at=int(self._bus.now()),
        )
        await self._bus.announce(self._said.sign(self._identity))

    async def _look_around(self) -> None:
        """Forget who is gone; listen to more or to less."""
        now = self._clock()
        for node in self.view.expire(now, self._lives):
            self._gone(node, "its announcement ran out")
        verdicts = self._doubts.verdicts(now, len(self.view))
        for node in verdicts.gone:
            if not self.is_linked(node):
                self._bury(node)
            else:
                self.found(node)
        for node in verdicts.check:
            self.on_doubt(node)
        before, config = self.listening, self._config.cells
        heard = [self.view.heard_at(depth) for depth in range(MAX_DEPTH + 1)]
        wanting = before.depth > 0 and self.needs_more()
        self.listening = before.after(heard, wanting=wanting, now=now, config=config)
        if self.listening.depth != before.depth:
            await self._bus.listen_to(self.listening.depth)

    def _lives(self, node: NodeId) -> bool:
        """Though its announcement ran out. While no relay is up nobody can say anything; after that
        they get time to.
        """
        now = self._clock()
        if not any(relay.connected for relay in self._bus.status()):
            self._deaf_until = now + 1.2 * self._config.refresh_s * self._slower
        return now < self._deaf_until or self.is_linked(node)

    # What others say.

    def _sequence_of(self, node: NodeId) -> int | None:
        known = self.view.get(node)
        return known.sequence if known else None

    def _on_announcement(self, announcement: Announcement) -> None:
        node, now = announcement.node, self._clock()
        if node == self._identity.node or self._dead.get(node, -1) >= announcement.sequence:
            return
        self._dead.pop(node, None)
        new, layout = self.view.get(node) is None, self.view.layout
        if not self.view.apply(announcement, now):  # we hold a newer one, or the mesh is full
            return
        self._doubts.heard(node, announcement.sequence, now)
        self._doubts.said(node, announcement.lost, now)
        if self._doubts.named_us(node, announcement.lost, now):
            self._named = True
            self._wake.set()
        if new:
            self._emit(NodeSeen(node, announcement.name))
            crowded = self.view.heard_at(self.listening.depth) > self._config.cells.most
        if announcement.lost or (new and crowded):
            self._wake.set()
        if self.view.layout != layout:
            self._tell()

    def _on_gone(self, node: NodeId) -> None:
        if self.view.remove(node):
            self._gone(node, "left")

    def _on_clock(self, offset_s: float) -> None:
        """What we have said so far bore a wrong time: the others may not have believed it."""
        self._emit(ClockSkewed(offset_s))
        self.changed()

    def _bury(self, node: NodeId) -> None:
        sequence = self._sequence_of(node)
        if sequence is not None:
            self._dead[node] = sequence
            self.view.remove(node)
            self._gone(node, "cannot be reached")

    def _gone(self, node: NodeId, reason: str) -> None:
        self._doubts.forget(node, self._clock())
        self._emit(NodeGone(node, reason))
        self._tell()

    def _tell(self) -> None:
        for listener in self._listeners:
            listener()
