"""Nodes for the tests of this folder."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from shoal.events import Event
from shoal.identity import Identity
from shoal.transport import (
    Carrier,
    Contact,
    Frame,
    Links,
    LinksConfig,
    MemoryConfig,
    MemoryNetwork,
    TlsCarrier,
    TlsConfig,
)
from shoal.units import NodeId

CHANNEL = 1


def identity(name: str) -> Identity:
    return Identity.from_secret(hashlib.sha256(name.encode()).digest())


AMBER, BIRCH, CEDAR, MALLORY = map(identity, ("amber", "birch", "cedar", "mallory"))


async def until(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    """Let the loop run until the condition holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)


@dataclass
class Node:
    """A node's links, with everything that came over them."""

    links: Links
    identity: Identity
    frames: list[tuple[NodeId, Frame]] = field(default_factory=list)
    lost: list[tuple[NodeId, str]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    @property
    def id(self) -> NodeId:
        return self.identity.node

    def bodies(self) -> list[bytes]:
        return [bytes(frame.body) for _, frame in self.frames]


@dataclass
class Mesh:
    """Nodes that know where the others are."""

    network: MemoryNetwork
    carrier: Callable[[Identity], Carrier]
    contacts: dict[NodeId, Contact] = field(default_factory=dict)
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def node(
        self,
        identity: Identity,
        config: LinksConfig | None = None,
        admit: Callable[[NodeId], bool] = lambda node: True,
        carriers: Sequence[Carrier] | None = None,
    ) -> Node:
        events: list[Event] = []
        links = Links(
            identity,
            carriers or [self.carrier(identity)],
            resolve=self.contacts.get,
            admit=admit,
            emit=events.append,
            config=config,
        )
        node = Node(links, identity, events=events)
        links.on(CHANNEL, lambda peer, frame: node.frames.append((peer, frame)))
        links.on_lost(lambda peer, reason: node.lost.append((peer, reason)))
        await self.stack.enter_async_context(links)
        self.contacts[identity.node] = Contact(
            identity.node, identity.transport_key, links.addresses
        )
        return node


@asynccontextmanager
async def open_mesh(kind: str, config: MemoryConfig | None = None) -> AsyncIterator[Mesh]:
    network = MemoryNetwork(config, seed=1)

    def tls(identity: Identity) -> Carrier:
        return TlsCarrier(identity, TlsConfig(host="127.0.0.1"))

    mesh = Mesh(network, tls if kind == "tls" else network.carrier)
    async with mesh.stack:
        yield mesh
