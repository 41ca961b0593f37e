"""The other nodes: where they are, who may come in, who cannot be reached."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator

from ..bus import StageOffer
from ..bus.membership import Membership
from ..errors import LinkClosed
from ..transport import Contact, Links
from ..units import NodeId

RECONNECT_S = 2.0  # a lost neighbour is given so long before it counts as gone


class Neighbours:
    """What membership knows joined with what the links tell. `meet` both before anything is asked.

    A private mesh knows its members by their announcements; at a public one anybody may knock.
    `start` runs a task beside everything else.
    """

    membership: Membership
    links: Links

    def __init__(
        self, *, private: bool, start: Callable[[Coroutine[None, None, None]], object]
    ) -> None:
        self._private, self._start = private, start
        self._calling: Counter[NodeId] = Counter()  # those lost that we are calling back
        self._unreached: set[NodeId] = set()  # those that did not answer our last call

    def meet(self, membership: Membership, links: Links) -> None:
        self.membership, self.links = membership, links
        links.on_lost(self._lost)

    def contact(self, node: NodeId) -> Contact | None:
        known = self.membership.view.get(node)
        return Contact(node, known.card.transport_key, known.addresses) if known else None

    def admits(self, node: NodeId) -> bool:
        return not self._private or self.membership.view.get(node) is not None

    def name(self, node: NodeId) -> str:
        known = self.membership.view.get(node)
        return known.name if known else node

    def offers(self) -> Iterator[tuple[NodeId, StageOffer]]:
        """Every stage of the others."""
        for announcement in self.membership.view.announcements():
            for offer in announcement.stages:
                yield announcement.node, offer

    def doubtful(self) -> frozenset[NodeId]:
        """No new session is planned through these: we lost the link ourselves, and they have not
        announced themselves since.
        """
        self._unreached &= self.membership.doubtful()
        return frozenset(self._calling) | self._unreached

    def check(self, node: NodeId) -> None:
        """Somebody says that it is gone: see for ourselves."""
        self._start(self._look_after(node))

    def _lost(self, node: NodeId, reason: str) -> None:
        """Until it is reached again, or given up."""
        self._calling[node] += 1
        self._start(self._call_back(node))

    async def _look_after(self, node: NodeId) -> None:
        """A link that nobody uses would cost a beat four times a second from now on."""
        if await self._call(node):
            self.membership.found(node)
            self.links.part(node)

    async def _call_back(self, node: NodeId) -> None:
        try:
            await self._call(node)
        finally:
            self._calling -= Counter((node,))

    async def _call(self, node: NodeId) -> bool:
        """Is there a link with it now?"""
        try:
            async with asyncio.timeout(RECONNECT_S):
                await self.links.connect(node)
        except (LinkClosed, TimeoutError):
            self._unreached.add(node)
            self.membership.suspect(node)
            return False
        self._unreached.discard(node)
        return True
