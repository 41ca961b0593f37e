"""Where we meet the others: relays, our own among them, and the local network."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AsyncExitStack

from ..api.config import is_loopback
from ..bus.lan import LanDiscovery
from ..bus.relay import EmbeddedRelay
from ..errors import BadConfig
from ..identity import Ticket
from ..units import NodeId
from .config import NodeConfig

RELAY_PORT = 7471  # tried first, so that a ticket still holds after a restart


class Meeting:
    """`relay` is our own, which runs when asked for, or when there is no other."""

    def __init__(self, config: NodeConfig) -> None:
        self._config = config
        self.relay: EmbeddedRelay | None = None

    async def open(self, stack: AsyncExitStack) -> None:
        config = self._config
        if config.relays and config.relay_port is None:
            return
        host = config.listen_host or "0.0.0.0"  # noqa: S104 - the mesh has to reach it
        kept = config.folders.relay_dir if config.relay_keep else None
        if config.relay_port is None:
            with contextlib.suppress(BadConfig):  # taken: another node runs on this machine
                usual = EmbeddedRelay(host=host, port=RELAY_PORT, database=kept)
                self.relay = await stack.enter_async_context(usual)
                return
        self.relay = await stack.enter_async_context(
            EmbeddedRelay(host=host, port=config.relay_port or 0, database=kept)
        )

    @property
    def relay_url(self) -> str | None:
        """Of the embedded relay, as this machine reaches it."""
        return self.relay.url if self.relay else None

    @property
    def urls(self) -> tuple[str, ...]:
        """Of all relays, ours first."""
        own = [self.relay_url] if self.relay_url else []
        return tuple(dict.fromkeys((*own, *self._config.relays)))

    async def search(self, stack: AsyncExitStack, me: NodeId, found: Callable[[str], None]) -> None:
        """Show ourselves in the local network; `found` gets the relays of others there."""
        if not self._config.lan:
            return
        host = self._config.listen_host
        search = LanDiscovery(
            me,
            self._config.mesh,
            found,
            port=self.relay.port if self.relay else 0,
            interfaces=[host] if is_loopback(host) else None,
        )
        await stack.enter_async_context(search)

    def ticket(self, addresses: tuple[str, ...]) -> Ticket:
        """What another machine needs to join, if nodes reach us at `addresses`."""
        mesh = self._config.mesh
        relays = list(self._config.relays)
        if self.relay is not None:
            hosts = [address.rpartition(":")[0] for address in addresses]
            relays += [f"ws://{host}:{self.relay.port}" for host in hosts]
        return Ticket(
            mesh=mesh.name,
            secret=mesh.secret,
            relays=tuple(relays[:8]),
            addresses=addresses[:16],
        )
