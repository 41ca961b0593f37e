"""Measures the way to a few other nodes, so that our coordinates mean something before there is any
work: dials them once, waits for some answers, and ends the links that nobody uses.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Protocol

from ..bus import Announcement, MeshView
from ..errors import LinkClosed
from ..units import NodeId
from .distances import Latency

ENOUGH = 8  # measured nodes: with so many a place can be told
FIRST_S = 2.0  # after joining, when we have heard who is there
AGAIN_S = 600.0  # a place may change: two more are measured from time to time
AGAIN = 2
NEAREST = 8  # measured once the first have told where we are
DIAL_S = 3.0
STAY_S = 1.5  # for a few pings


class Ways(Protocol):
    """What we need from `Links`."""

    async def connect(self, node: NodeId) -> None: ...
    def is_connected(self, node: NodeId) -> bool: ...
    def rtt(self, node: NodeId) -> float | None: ...
    def part(self, node: NodeId) -> None: ...


class Surveyor:
    """`run` it in the background. `latency` estimates ways from here; `chance` spreads the dials of
    many nodes over time and over the mesh.
    """

    def __init__(
        self,
        me: NodeId,
        view: MeshView,
        links: Ways,
        latency: Latency,
        *,
        chance: random.Random,
    ) -> None:
        self._me, self._view, self._links = me, view, links
        self._latency, self._chance = latency, chance

    async def run(self) -> None:
        """Forever."""
        await asyncio.sleep(FIRST_S * self._chance.uniform(0.5, 1.5))
        await self.survey(ENOUGH - len(self._measured()))
        await self.survey(NEAREST)  # by now it is known who is near
        while True:
            await asyncio.sleep(AGAIN_S * self._chance.uniform(0.5, 1.5))
            await self.survey(max(AGAIN, ENOUGH - len(self._measured())))

    async def survey(self, count: int) -> None:
        """Measure so many nodes that were not measured yet, one after the other."""
        known = self._measured()
        others = [said for said in self._view.announcements() if said.node not in known]
        for node in spread(self._me, others, count, self._latency, self._chance):
            await self._measure(node)

    async def _measure(self, node: NodeId) -> None:
        if self._links.is_connected(node):
            return  # it is measured without us
        try:
            async with asyncio.timeout(DIAL_S):
                await self._links.connect(node)
        except (LinkClosed, TimeoutError):
            return
        await asyncio.sleep(STAY_S)
        self._links.part(node)

    def _measured(self) -> frozenset[NodeId]:
        said = self._view.announcements()
        return frozenset(each.node for each in said if self._links.rtt(each.node) is not None)


def spread(
    me: NodeId,
    others: Sequence[Announcement],
    count: int,
    latency: Latency,
    chance: random.Random,
) -> list[NodeId]:
    """Half of them what seems nearest, since near ways decide most; the rest by lot, since only far
    ones tell where in the world we are. Of those that seem equally near, chance decides.
    """
    nodes = [said.node for said in others if said.addresses and said.node != me]
    chance.shuffle(nodes)
    near = sorted(nodes, key=lambda node: latency(me, node))[: max(0, count) // 2]
    rest = [node for node in nodes if node not in near]
    return [*near, *rest[: max(0, count) - len(near)]]
