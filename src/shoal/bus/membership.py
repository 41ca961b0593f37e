"""Our place in the mesh: what we announce, whom we see, who has gone.

Announces at once when something about us changes, else on a slow jittered beat; forgets nodes whose
announcement ran out, and nodes that a broken link proved dead until they announce themselves anew.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass

from ..events import Emit, NodeGone, NodeSeen
from ..identity import Identity
from ..units import NodeId
from .announcement import Announcement
from .base import Bus
from .limits import Bounded
from .view import MAX_NODES, MeshView


@dataclass(kw_only=True, frozen=True, slots=True)
class MembershipConfig:
    refresh_s: float = 40.0  # a third of the lifetime: two may be lost
    lifetime_s: float = 120.0
    debounce_s: float = 0.05  # several changes in a row make one announcement


class Membership:
    """Keeps `view` true. `describe` gives our announcement, unsigned; `changed` says that it is
    different now.
    """

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
        self.view = MeshView()
        self._bus, self._identity, self._describe = bus, identity, describe
        self._emit, self._clock, self._chance = emit, clock, chance
        self._config = config or MembershipConfig()
        self._changed = asyncio.Event()
        self._listeners: list[Callable[[], None]] = []
        self._left = False
        # the sequence of the last announcement before we saw a node die
        self._dead: Bounded[NodeId, int] = Bounded(MAX_NODES)
        self._sequence = int(
            wall_clock() * 1000
        )  # so that a restarted node is not older than itself
        bus.listen(self._on_announcement, self._on_gone)

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` after every change of the view."""
        self._listeners.append(listener)

    def changed(self) -> None:
        """Something that we announce is different now."""
        self._changed.set()

    def suspect(self, node: NodeId) -> None:
        """A link to `node` broke and could not be made again: it is gone until it announces itself
        anew.
        """
        known = self.view.get(node)
        if known is not None:
            self._dead[node] = known.sequence
            self._forget(node, "cannot be reached")

    async def run(self) -> None:
        """Announce, refresh, forget: forever."""
        config = self._config
        while True:
            self._changed.clear()
            await self._announce()
            wait_s = config.refresh_s * self._chance.uniform(0.8, 1.2)
            try:
                async with asyncio.timeout(wait_s):
                    await self._changed.wait()
                    await asyncio.sleep(config.debounce_s)
            except TimeoutError:
                pass
            self._expire()

    async def leave(self) -> None:
        """Say goodbye. What changes about us afterwards is not announced: it would take it back."""
        self._left = True
        await self._bus.withdraw()

    async def _announce(self) -> None:
        if self._left:
            return
        self._sequence += 1
        await self._bus.announce(self._describe(self._sequence).sign(self._identity))

    def _expire(self) -> None:
        self.view, gone = self.view.expired(self._clock(), self._config.lifetime_s)
        for node in gone:
            self._emit(NodeGone(node, "its announcement ran out"))
        if gone:
            self._tell()

    def _on_announcement(self, announcement: Announcement) -> None:
        node = announcement.node
        if node == self._identity.node or self._dead.get(node, -1) >= announcement.sequence:
            return
        self._dead.pop(node, None)
        old, before = self.view, self.view.get(node)
        self.view = old.applied(announcement, self._clock())
        if self.view is old:  # we hold a newer one, or the mesh is full
            return
        if before is None:
            self._emit(NodeSeen(node, announcement.name))
        if before is None or before.stages != announcement.stages:
            self._tell()

    def _on_gone(self, node: NodeId) -> None:
        if self.view.get(node) is not None:
            self._forget(node, "left")

    def _forget(self, node: NodeId, reason: str) -> None:
        self.view = self.view.without(node)
        self._emit(NodeGone(node, reason))
        self._tell()

    def _tell(self) -> None:
        for listener in self._listeners:
            listener()
