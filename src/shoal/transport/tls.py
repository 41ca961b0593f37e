"""The `tls` carrier: TCP with TLS 1.3, both ends known by key. For LANs, data centres, loopback.

It crosses no NAT and hides no traffic pattern; whoever connects learns which node listens.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ..errors import BadConfig, BadFrame, BadProof, LinkClosed, PeerError
from ..identity import Card, Identity
from . import handshake
from .addresses import (
    format_address,
    is_loopback,
    network_of,
    parse_address,
    reachable_hosts,
)
from .base import Admit, Contact, Link, OnFault, OnLink
from .certificate import check_protocol, client_context, presented_key, server_context
from .door import Door, DoorConfig
from .link import LinkConfig, WireLink
from .race import first_success
from .tls_wire import TlsWire

_SHUTDOWN_S = 1.0
_MAX_ADDRESSES = 8  # of one node: of more, nobody would dial the rest


@dataclass(kw_only=True, frozen=True, slots=True)
class TlsConfig:
    host: str = ""  # "" = all interfaces, IPv4 and IPv6
    port: int = 0  # 0 = any free port
    handshake_s: float = 5.0
    stagger_s: float = 0.25  # before the next address of a node is tried as well
    door: DoorConfig = DoorConfig()
    link: LinkConfig = LinkConfig()


class TlsCarrier:
    """Listens and dials on TCP. See `handshake.py` for the proof of identity."""

    name = "tls"

    def __init__(self, identity: Identity, config: TlsConfig | None = None) -> None:
        self._identity = identity
        self._config = config or TlsConfig()
        self._door = Door(self._config.door)
        self._server: asyncio.Server | None = None
        self._client_context: ssl.SSLContext | None = None
        self._strangers: set[asyncio.Task[None]] = set()
        self._wires: set[TlsWire] = set()

    async def listen(self, on_link: OnLink, admit: Admit, on_fault: OnFault) -> tuple[str, ...]:
        loop = asyncio.get_running_loop()
        listening = _bind(self._config.host, self._config.port)
        context = server_context(self._identity.transport_secret())

        def welcome(tcp: asyncio.Transport) -> None:
            task = loop.create_task(self._receive(tcp, context, on_link, admit, on_fault))
            self._strangers.add(task)
            task.add_done_callback(self._strangers.discard)

        self._server = await loop.create_server(
            partial(_Doorstep, welcome), sock=listening, backlog=512
        )
        port = listening.getsockname()[1]
        hosts = reachable_hosts(self._config.host)[:_MAX_ADDRESSES]
        return tuple(format_address(host, port) for host in hosts)

    async def dial(self, contact: Contact) -> Link:
        places = [parse_address(address) for address in contact.addresses]
        attempts = [partial(self._call, contact, *place) for place in places if place is not None][
            :_MAX_ADDRESSES
        ]
        return await first_success(
            attempts, stagger_s=self._config.stagger_s, discard=WireLink.abort
        )

    async def aclose(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._strangers:
            task.cancel()
        if self._strangers:
            await asyncio.wait(self._strangers)
        if self._wires:
            await asyncio.wait([wire.gone for wire in self._wires], timeout=_SHUTDOWN_S)
        for wire in list(self._wires):
            wire.abort()

    async def _call(self, contact: Contact, host: str, port: int) -> WireLink:
        """Dial one address; nothing is sent before the right key has answered."""
        if self._client_context is None:
            self._client_context = client_context()
        wire = TlsWire(self._wires)
        try:
            async with asyncio.timeout(self._config.handshake_s):
                await asyncio.get_running_loop().create_connection(
                    lambda: wire,
                    host,
                    port,
                    ssl=self._client_context,
                    server_hostname="",  # no SNI: it would be in clear
                    ssl_handshake_timeout=self._config.handshake_s,
                    ssl_shutdown_timeout=_SHUTDOWN_S,
                )
                card = await self._prove_ourselves(wire, contact)
        except TimeoutError:
            wire.abort()
            raise LinkClosed(f"no answer from {format_address(host, port)}") from None
        except BaseException:
            wire.abort()
            raise
        return self._link(wire, card)

    async def _prove_ourselves(self, wire: TlsWire, contact: Contact) -> Card:
        check_protocol(wire.tls)
        if presented_key(wire.tls) != contact.transport_key:
            raise BadProof("another node answered")
        hello = await wire.exactly(handshake.HELLO_BYTES)
        card, answer = handshake.answer(self._identity, contact, hello)
        wire.write(answer)
        if await wire.exactly(1) != handshake.ACCEPTED:
            raise LinkClosed("the other node does not admit us")
        return card

    async def _receive(
        self,
        tcp: asyncio.Transport,
        context: ssl.SSLContext,
        on_link: OnLink,
        admit: Admit,
        on_fault: OnFault,
    ) -> None:
        """Let one stranger in, if it proves who it is in time and may come in."""
        network = network_of(str(tcp.get_extra_info("peername")[0]))
        now = asyncio.get_running_loop().time
        if not self._door.enter(network, now()):
            tcp.abort()
            return
        wire = TlsWire(self._wires)
        try:
            card = await self._ask_who(wire, tcp, context)
            if not admit(card.node):
                wire.write(handshake.REFUSED)
                wire.close()
                return
            wire.write(handshake.ACCEPTED)
            on_link(self._link(wire, card))
        except PeerError as fault:
            tcp.abort()
            if not is_loopback(network):
                self._door.blame(network, fault.penalty, now())
            on_fault(None, fault)
        except (OSError, LinkClosed):
            tcp.abort()  # it went away by itself: nothing to blame
        except BaseException:
            tcp.abort()
            raise
        finally:
            self._door.leave(network)

    async def _ask_who(
        self, wire: TlsWire, tcp: asyncio.Transport, context: ssl.SSLContext
    ) -> Card:
        """The stranger's card, proved. Nothing but the bytes of the proof is read before."""
        try:
            async with asyncio.timeout(self._config.handshake_s):
                await _start_tls(wire, tcp, context, self._config.handshake_s)
                check_protocol(wire.tls)
                nonce = os.urandom(handshake.NONCE_BYTES)
                wire.write(handshake.hello(self._identity.card, nonce))
                answer = await wire.exactly(handshake.ANSWER_BYTES)
        except TimeoutError:
            raise BadFrame("no proof of identity in time") from None
        except ssl.SSLError as error:
            raise BadFrame(f"not a TLS handshake of ours: {error.reason}") from None
        if wire.unread:
            raise BadFrame("bytes before the proof was accepted")
        return handshake.check_answer(self._identity.transport_key, nonce, answer)

    def _link(self, wire: TlsWire, card: Card) -> WireLink:
        loop = asyncio.get_running_loop()
        link = WireLink(wire, card, config=self._config.link, clock=loop.time)
        wire.serve(link)
        return link


class _Doorstep(asyncio.Protocol):
    """Takes a fresh TCP connection, reads nothing from it and hands it on."""

    def __init__(self, welcome: Callable[[asyncio.Transport], None]) -> None:
        self._welcome = welcome

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101  for the type checker
        transport.pause_reading()
        self._welcome(transport)


async def _start_tls(
    wire: TlsWire, tcp: asyncio.Transport, context: ssl.SSLContext, timeout_s: float
) -> None:
    try:
        transport = await asyncio.get_running_loop().start_tls(
            tcp,
            wire,
            context,
            server_side=True,
            ssl_handshake_timeout=timeout_s,
            ssl_shutdown_timeout=_SHUTDOWN_S,
        )
    except ConnectionAbortedError:
        raise TimeoutError from None  # how asyncio reports that `ssl_handshake_timeout` has passed
    if transport is None:
        raise LinkClosed("the connection ended during the handshake")
    wire.connection_made(transport)


def _bind(host: str, port: int) -> socket.socket:
    """A listening socket, for both IP families where the host allows it. Raises BadConfig."""
    try:
        if host in ("", "::") and socket.has_dualstack_ipv6():
            with contextlib.suppress(OSError):  # no IPv6 on this machine
                return socket.create_server(
                    ("::", port), family=socket.AF_INET6, dualstack_ipv6=True
                )
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise BadConfig(
            f"cannot listen on {format_address(host or '*', port)}: {error.strerror}",
            hint="choose another port, or 0 for any free one",
        ) from None
