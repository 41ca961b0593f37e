"""Finding relays of our mesh in the local network by multicast DNS.

Anybody in the LAN can say anything here: what is found is a hint where a relay may be.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address
from typing import Self

import psutil
from zeroconf import (
    BadTypeInNameException,
    IPVersion,
    ServiceStateChange,
    Zeroconf,
)
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from ..identity import Mesh
from ..units import NodeId
from .base import MAX_RELAYS

SERVICE = "_shoal._tcp.local."

_VERSION = b"1"
_ASK_MS = 3000
_MAX_ADDRESSES = 4
_MAX_ASKED_AT_ONCE = 16


class LanDiscovery:
    """Advertises our relay's `port` (0: nothing to advertise) and finds those of others.

    `on_relay(url)` is called once for each ws://address:port of a node of the same mesh.
    `interfaces` are local IPv4 addresses; default all but loopback. A machine without a
    usable network is no error: `error` tells, and nothing is found.
    """

    def __init__(
        self,
        node: NodeId,
        mesh: Mesh,
        on_relay: Callable[[str], None],
        *,
        port: int = 0,
        interfaces: Sequence[str] | None = None,
    ) -> None:
        self._node, self._mesh, self._on_relay, self._port = node, mesh, on_relay, port
        self._interfaces = interfaces
        self._found: set[str] = set()
        self._asking: set[asyncio.Task[None]] = set()
        self._zeroconf: AsyncZeroconf | None = None
        self._browser: AsyncServiceBrowser | None = None
        self.error = ""

    async def __aenter__(self) -> Self:
        addresses = _usable(self._interfaces)
        if not addresses:
            self.error = "no discovery in the local network: this machine is in none"
            return self
        try:
            self._zeroconf = AsyncZeroconf(interfaces=addresses, ip_version=IPVersion.V4Only)
            if self._port:
                await self._zeroconf.async_register_service(
                    self._service(addresses), cooperating_responders=True
                )
            self._browser = AsyncServiceBrowser(
                self._zeroconf.zeroconf, SERVICE, handlers=[self._on_change]
            )
        except (OSError, RuntimeError) as error:
            self.error = f"no discovery in the local network: {error}"
        return self

    async def __aexit__(self, *exc: object) -> None:
        for task in self._asking:
            task.cancel()
        await asyncio.gather(*self._asking, return_exceptions=True)
        if self._browser is not None:
            await self._browser.async_cancel()
        if self._zeroconf is not None:
            await self._zeroconf.async_close()

    def _service(self, addresses: Sequence[str]) -> AsyncServiceInfo:
        return AsyncServiceInfo(
            SERVICE,
            f"{self._node[:24]}.{SERVICE}",
            port=self._port,
            properties={"v": _VERSION, "topic": self._mesh.topic, "node": self._node},
            parsed_addresses=list(addresses)[:_MAX_ADDRESSES],
        )

    def _on_change(
        self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        if state_change is ServiceStateChange.Removed or len(self._asking) >= _MAX_ASKED_AT_ONCE:
            return
        task = asyncio.create_task(self._ask(zeroconf, name))
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    async def _ask(self, zeroconf: Zeroconf, name: str) -> None:
        try:
            info = AsyncServiceInfo(SERVICE, name)
            known = await info.async_request(zeroconf, _ASK_MS)
        except BadTypeInNameException:
            return
        for url in self._urls(info) if known else ():
            if url not in self._found and len(self._found) < MAX_RELAYS:
                self._found.add(url)
                self._on_relay(url)

    def _urls(self, info: AsyncServiceInfo) -> list[str]:
        """ws://address:port of a node of our mesh; nothing in a name or a text is trusted."""
        said = info.properties
        ours = said.get(b"topic") == self._mesh.topic.encode() and said.get(b"v") == _VERSION
        if not ours or said.get(b"node") == self._node.encode() or not info.port:
            return []
        addresses = info.parsed_addresses(IPVersion.V4Only)[:_MAX_ADDRESSES]
        return [f"ws://{IPv4Address(address)}:{info.port}" for address in addresses]


def _usable(interfaces: Sequence[str] | None) -> list[str]:
    """This machine's IPv4 addresses: those of `interfaces` that exist, or all but loopback."""
    here = [address for addresses in psutil.net_if_addrs().values() for address in addresses]
    ours = {found.address for found in here if found.family == socket.AF_INET}
    if interfaces is not None:
        return sorted(ours.intersection(interfaces))
    return sorted(address for address in ours if not IPv4Address(address).is_loopback)
