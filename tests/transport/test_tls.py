"""The `tls` carrier against impostors, strangers and hostile peers; the proof, live."""

import asyncio
import os
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from shoal.errors import BadProof, LinkClosed
from shoal.identity import Identity
from shoal.transport import Contact, Frame, LinksConfig, PeerConfig, TlsCarrier, TlsConfig
from shoal.transport.addresses import parse_address
from shoal.transport.base import Link
from shoal.transport.certificate import client_context, presented_key, server_context
from shoal.transport.control import Confirm, Goodbye, Ping, control_frame
from shoal.transport.door import DoorConfig
from shoal.transport.frames import encode
from shoal.transport.handshake import ACCEPTED, ANSWER_BYTES, HELLO_BYTES, answer, hello
from tests.transport.nodes import (
    AMBER,
    BIRCH,
    CEDAR,
    CHANNEL,
    MALLORY,
    Mesh,
    Node,
    open_mesh,
    until,
)

pytestmark = pytest.mark.anyio

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture
async def mesh() -> AsyncIterator[Mesh]:
    async with open_mesh("tls") as mesh:
        yield mesh


def contact(identity: Identity, *addresses: str) -> Contact:
    return Contact(identity.node, identity.transport_key, addresses)


def place(node: Node) -> tuple[str, int]:
    found = parse_address(node.links.addresses[0])
    assert found is not None
    return found


@asynccontextmanager
async def tls_to(node: Node, context: ssl.SSLContext | None = None) -> AsyncIterator[Streams]:
    """A client that speaks TLS and then whatever the test wants."""
    reader, writer = await asyncio.open_connection(
        *place(node), ssl=context or client_context(), server_hostname=""
    )
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        await asyncio.sleep(0)


@asynccontextmanager
async def authenticated(node: Node, identity: Identity) -> AsyncIterator[Streams]:
    """A client that has proved who it is and has a confirmed link, but is free to misbehave."""
    async with tls_to(node) as (reader, writer):
        server_hello = await reader.readexactly(HELLO_BYTES)
        writer.write(answer(identity, contact(node.identity), server_hello)[1])
        assert await reader.readexactly(1) == ACCEPTED
        writer.write(b"".join(encode(control_frame(Confirm()))))
        await until(lambda: identity.node in node.links.peers())
        yield reader, writer


async def ends(reader: asyncio.StreamReader) -> bool:
    """True when the node hangs up within two seconds."""
    try:
        async with asyncio.timeout(2):
            while await reader.read(1 << 16):
                pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


@asynccontextmanager
async def impostor(
    behave: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
    context: ssl.SSLContext,
) -> AsyncIterator[str]:
    """A TLS server that is not one of our nodes; gives its address."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await behave(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await asyncio.sleep(0.01)


def secret_of(identity: Identity) -> bytes:
    return identity.transport_secret()


# The seven conditions of the proof.


async def test_1_the_client_compares_the_key_before_it_sends_anything() -> None:
    heard = asyncio.get_running_loop().create_future()

    async def pose(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(hello(BIRCH.card, os.urandom(32)))
        try:
            heard.set_result(await reader.read(1 << 16))
        except OSError:
            heard.set_result(b"")

    async with impostor(pose, server_context(secret_of(MALLORY))) as address:
        with pytest.raises(LinkClosed, match="another node answered"):
            await TlsCarrier(AMBER).dial(contact(BIRCH, address))
        assert await heard == b""


async def test_2_the_nonce_is_fresh_and_an_old_answer_is_worth_nothing(mesh: Mesh) -> None:
    birch = await mesh.node(BIRCH)
    async with tls_to(birch) as (reader, writer):
        first = await reader.readexactly(HELLO_BYTES)
        used = answer(AMBER, contact(BIRCH), first)[1]
        writer.write(used)
        assert await reader.readexactly(1) == ACCEPTED
    async with tls_to(birch) as (reader, writer):
        second = await reader.readexactly(HELLO_BYTES)
        assert first[:32] != second[:32]
        writer.write(used)
        assert await ends(reader)
    assert birch.links.faults[None] == 1


async def test_3_an_answer_given_to_another_server_opens_no_door(mesh: Mesh) -> None:
    """Amber dials Mallory on purpose; Mallory hands Birch's nonce on, and Amber's answer back."""
    birch = await mesh.node(BIRCH)
    async with tls_to(birch) as (reader, writer):
        nonce = (await reader.readexactly(HELLO_BYTES))[:32]
        passed_on = asyncio.get_running_loop().create_future()

        async def pose(theirs: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
            back.write(hello(MALLORY.card, nonce))
            passed_on.set_result(await theirs.readexactly(ANSWER_BYTES))

        async with impostor(pose, server_context(secret_of(MALLORY))) as address:
            with pytest.raises(LinkClosed):
                await TlsCarrier(AMBER).dial(contact(MALLORY, address))
        writer.write(await passed_on)
        assert await ends(reader)
    assert not birch.links.peers()
    assert birch.links.faults[None] == 1


async def test_4_only_an_answer_of_exactly_the_right_length_is_looked_at(mesh: Mesh) -> None:
    birch = await mesh.node(BIRCH)
    async with tls_to(birch) as (reader, writer):
        good = answer(AMBER, contact(BIRCH), await reader.readexactly(HELLO_BYTES))[1]
        writer.write(good + b"more")
        assert await ends(reader)
    assert birch.links.faults[None] == 1
    assert not birch.links.peers()


async def test_5_there_is_no_resumption(mesh: Mesh) -> None:
    birch = await mesh.node(BIRCH)

    def session() -> ssl.SSLSession | None:
        connection = socket.create_connection(place(birch), timeout=5)
        with client_context().wrap_socket(connection) as tls:
            tls.read(HELLO_BYTES)
            return tls.session

    got = await asyncio.to_thread(session)
    assert got is None or not got.has_ticket


async def test_6_a_key_that_anybody_can_sign_for_is_refused(mesh: Mesh) -> None:
    birch = await mesh.node(BIRCH)
    async with tls_to(birch) as (reader, writer):
        await reader.readexactly(HELLO_BYTES)
        card = AMBER.card.encode()
        weak = bytes([1]) + bytes(31)
        forged = bytes([1]) + bytes(63)
        writer.write(card[:32] + weak + card[64:128] + forged + forged)
        assert await ends(reader)
    assert birch.links.faults[None] == 1


async def test_7_a_client_of_another_protocol_is_refused(mesh: Mesh) -> None:
    birch = await mesh.node(BIRCH)
    context = client_context()
    context.set_alpn_protocols(["h2"])
    with pytest.raises((ssl.SSLError, asyncio.IncompleteReadError, ConnectionError)):
        async with tls_to(birch, context) as (reader, _):
            await reader.readexactly(HELLO_BYTES)
    await until(lambda: birch.links.faults[None] == 1)


async def test_7_a_server_of_another_protocol_is_refused() -> None:
    async def pose(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(hello(BIRCH.card, os.urandom(32)))
        await reader.read(1)

    context = server_context(secret_of(BIRCH))
    context.set_alpn_protocols([])
    async with impostor(pose, context) as address:
        with pytest.raises(LinkClosed, match="our protocol"):
            await TlsCarrier(AMBER).dial(contact(BIRCH, address))


async def test_small_frames_leave_at_once_on_both_sides(mesh: Mesh) -> None:
    """asyncio sets TCP_NODELAY only where the socket names its protocol; accepted ones do not."""
    carriers = [TlsCarrier(each, TlsConfig(host="127.0.0.1")) for each in (AMBER, BIRCH)]
    amber, birch = [
        await mesh.node(identity, carriers=[carrier])
        for identity, carrier in zip((AMBER, BIRCH), carriers, strict=True)
    ]
    await amber.links.connect(birch.id)
    for carrier in carriers:
        (wire,) = carrier._wires
        assert wire._transport is not None
        tcp = wire._transport.get_extra_info("socket")
        assert tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


# Strangers and hostile peers against a live node.


@asynccontextmanager
async def a_working_pair(mesh: Mesh, birch: Node) -> AsyncIterator[None]:
    """Cedar is linked to Birch; afterwards that link still works."""
    cedar = await mesh.node(CEDAR)
    await cedar.links.connect(birch.id)
    yield
    cedar.links.send(birch.id, Frame(CHANNEL, b"", b"still here"))
    await until(lambda: b"still here" in birch.bodies())
    assert not cedar.lost
    amber = await mesh.node(AMBER)
    await amber.links.connect(birch.id)


async def test_random_bytes_instead_of_tls_are_counted_and_harm_nobody(mesh: Mesh) -> None:
    birch = await mesh.node(BIRCH)
    async with a_working_pair(mesh, birch):
        reader, writer = await asyncio.open_connection(*place(birch))
        writer.write(os.urandom(5000))
        assert await ends(reader)
        writer.transport.abort()
        await until(lambda: birch.links.faults[None] == 1)


async def test_random_bytes_instead_of_a_proof_are_counted_and_harm_nobody(mesh: Mesh) -> None:
    birch = await mesh.node(BIRCH)
    async with a_working_pair(mesh, birch):
        async with tls_to(birch) as (reader, writer):
            writer.write(os.urandom(ANSWER_BYTES))
            assert await ends(reader)
        await until(lambda: birch.links.faults[None] == 1)


@pytest.mark.parametrize(
    "attack",
    [
        struct.pack(">IBBI", 0xFFFFFFFF, 1, CHANNEL, 0),
        struct.pack(">IBBI", 6, 2, CHANNEL, 0),
        struct.pack(">IBBI", 6, 1, CHANNEL, 1),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        bytes(range(256)) * 40,
    ],
    ids=["oversized", "wrong version", "wrong lengths", "http", "noise"],
)
async def test_a_hostile_peer_is_dropped_and_counted_and_harms_nobody(
    mesh: Mesh, attack: bytes
) -> None:
    birch = await mesh.node(BIRCH)
    async with a_working_pair(mesh, birch), authenticated(birch, MALLORY) as (reader, writer):
        writer.write(attack)
        assert await ends(reader)
        assert birch.links.faults == {MALLORY.node: 1}
        assert [node for node, _ in birch.lost] == [MALLORY.node]
        with pytest.raises((AssertionError, asyncio.IncompleteReadError)):
            async with authenticated(birch, MALLORY):
                pass


async def test_frames_before_the_link_is_confirmed_are_a_fault(mesh: Mesh) -> None:
    birch = await mesh.node(BIRCH)
    async with tls_to(birch) as (reader, writer):
        writer.write(answer(MALLORY, contact(BIRCH), await reader.readexactly(HELLO_BYTES))[1])
        assert await reader.readexactly(1) == ACCEPTED
        writer.write(b"".join(map(bytes, encode(Frame(CHANNEL, b"", b"early")))))
        assert await ends(reader)
    assert birch.links.faults == {MALLORY.node: 1}
    assert not birch.frames


async def test_a_link_that_is_never_confirmed_is_ended(mesh: Mesh) -> None:
    birch = await mesh.node(BIRCH, LinksConfig(peer=PeerConfig(dial_s=0.1)))
    async with tls_to(birch) as (reader, writer):
        writer.write(answer(MALLORY, contact(BIRCH), await reader.readexactly(HELLO_BYTES))[1])
        assert await ends(reader)
    assert not birch.links.faults


async def test_halves_of_frames_from_many_peers_are_bounded(mesh: Mesh) -> None:
    birch = await mesh.node(BIRCH, LinksConfig(max_unfinished_bytes=100_000))
    async with a_working_pair(mesh, birch), authenticated(birch, MALLORY) as (reader, writer):
        writer.write(struct.pack(">IBBI", 6 + 1_000_000, 1, CHANNEL, 0) + bytes(200_000))
        assert await ends(reader)
        assert birch.lost == [(MALLORY.node, "it left large frames unfinished")]


async def test_a_goodbye_cannot_write_to_our_terminal(mesh: Mesh) -> None:
    birch = await mesh.node(BIRCH)
    async with authenticated(birch, MALLORY) as (_, writer):
        writer.write(b"".join(encode(control_frame(Goodbye("\x1b[2Jbye\n")))))
        await until(lambda: birch.lost)
    assert birch.lost == [(MALLORY.node, "[2Jbye")]
    assert not birch.links.faults


async def test_who_is_slow_to_prove_itself_is_cut_off(mesh: Mesh) -> None:
    hurried = TlsCarrier(BIRCH, TlsConfig(host="127.0.0.1", handshake_s=0.2))
    birch = await mesh.node(BIRCH, carriers=[hurried])
    async with a_working_pair(mesh, birch):
        reader, writer = await asyncio.open_connection(*place(birch))
        async with tls_to(birch) as (inner, _):
            assert await ends(reader)
            assert await ends(inner)
        writer.transport.abort()
        await until(lambda: birch.links.faults[None] == 2)


async def test_silent_strangers_take_a_bounded_number_of_places(mesh: Mesh) -> None:
    door = DoorConfig(max_strangers=8, max_strangers_per_network=4)
    birch = await mesh.node(
        BIRCH, carriers=[TlsCarrier(BIRCH, TlsConfig(host="127.0.0.1", door=door))]
    )
    cedar = await mesh.node(CEDAR)
    await cedar.links.connect(birch.id)
    strangers = [await asyncio.open_connection(*place(birch)) for _ in range(10)]
    closed = [reader for reader, _ in strangers[4:]]
    assert all([await ends(reader) for reader in closed])
    assert not strangers[0][0].at_eof()
    cedar.links.send(birch.id, Frame(CHANNEL, b"", b"served"))
    await until(lambda: birch.frames)
    for _, writer in strangers:
        writer.transport.abort()
    amber = await mesh.node(AMBER)
    await asyncio.sleep(0.02)
    await amber.links.connect(birch.id)


async def test_a_stranger_that_hangs_up_is_no_fault(mesh: Mesh) -> None:
    birch = await mesh.node(BIRCH)
    _, writer = await asyncio.open_connection(*place(birch))
    writer.close()
    async with tls_to(birch) as (reader, _):
        await reader.readexactly(HELLO_BYTES)
    amber = await mesh.node(AMBER)
    await amber.links.connect(birch.id)
    assert not birch.links.faults


async def test_a_right_address_after_wrong_ones_is_found(mesh: Mesh) -> None:
    birch = await mesh.node(BIRCH)
    carrier = TlsCarrier(AMBER, TlsConfig(stagger_s=0.02))
    addresses = ("127.0.0.1:1", "memory:x", "nonsense", *birch.links.addresses)
    link: Link = await carrier.dial(contact(BIRCH, *addresses))
    assert link.peer == birch.id
    link.abort()
    with pytest.raises(LinkClosed, match="Connect"):
        await carrier.dial(contact(BIRCH, "127.0.0.1:1"))
    with pytest.raises(LinkClosed, match="no address"):
        await carrier.dial(contact(BIRCH, "memory:x"))
    await carrier.aclose()


async def test_all_interfaces_are_served_by_default() -> None:
    carrier = TlsCarrier(BIRCH)
    addresses = await carrier.listen(lambda link: None, lambda node: True, lambda node, fault: None)
    try:
        assert addresses
        places = [parse_address(address) for address in addresses]
        assert all(found is not None for found in places)
        assert places[0] is not None
        _, writer = await asyncio.open_connection("127.0.0.1", places[0][1])
        writer.transport.abort()
    finally:
        await carrier.aclose()


def test_a_certificate_without_an_ed25519_key_is_refused() -> None:
    class Shown:
        def getpeercert(self, binary_form: bool) -> bytes:
            return b"no certificate"

    with pytest.raises(BadProof, match="cannot be read"):
        presented_key(Shown())  # type: ignore[arg-type]


async def test_no_more_addresses_are_announced_than_anybody_dials(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bridges = [f"10.0.{number}.1" for number in range(40)]  # a machine full of containers
    monkeypatch.setattr("shoal.transport.tls.reachable_hosts", lambda bound: bridges)
    carrier = TlsCarrier(AMBER, TlsConfig(host="127.0.0.1"))
    try:
        found = await carrier.listen(lambda link: None, lambda node: True, lambda node, fault: None)
    finally:
        await carrier.aclose()
    assert [address.partition(":")[0] for address in found] == bridges[:8]


async def test_who_pings_and_does_not_read_fills_no_memory_with_answers(mesh: Mesh) -> None:
    birch = await mesh.node(BIRCH)
    ping = b"".join(map(bytes, encode(control_frame(Ping(7)))))
    async with a_working_pair(mesh, birch), authenticated(birch, MALLORY) as (_, writer):
        link = birch.links._peers[MALLORY.node].live
        assert link is not None
        for _ in range(600):
            writer.write(ping * 1000)
            await writer.drain()
        await until(lambda: link.queued_bytes > 0)
        assert link.queued_bytes < 2 << 20
