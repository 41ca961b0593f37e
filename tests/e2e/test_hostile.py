"""A live node and strangers with valid keys: it stays up, drops and counts them, and goes on
answering.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Awaitable, Callable, Iterator
from types import SimpleNamespace
from typing import cast

import httpx
import msgspec
import pytest

from shoal.config import Folders
from shoal.engine.request import Sampled, Sampling
from shoal.errors import LinkClosed
from shoal.identity import Identity, load_or_create
from shoal.pipeline.messages import (
    CHANNEL,
    Close,
    Lost,
    Message,
    Open,
    RowEntry,
    Step,
    TokenEntry,
    Tokens,
    pack_ids,
    to_frame,
)
from shoal.transport import Contact, Frame, FrameLimits, LinkConfig, Links, TlsCarrier, TlsConfig
from shoal.units import ModelId, SessionId, Slice

from .live import LiveNode, live_mesh, wait_for

pytestmark = pytest.mark.e2e

GENEROUS = TlsConfig(
    host="127.0.0.1",
    link=LinkConfig(frames=FrameLimits(max_header_bytes=1 << 20, max_body_bytes=64 << 20)),
)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveNode]:
    with live_mesh(tmp_path_factory.mktemp("hostile"), ["0:8"]) as (only,):
        yield only


def stranger() -> Identity:
    return Identity.from_secret(secrets.token_bytes(32))


def contact_of(node: LiveNode) -> Contact:
    identity = load_or_create(Folders.find({"SHOAL_HOME": str(node.home)}).identity_file)
    return Contact(identity.node, identity.transport_key, tuple(node.status()["addresses"]))


def faults(node: LiveNode) -> dict[str, int]:
    return node.status()["faults"]


def answers(node: LiveNode) -> str:
    body = {"model": "shoal-tiny", "prompt": "def f(", "max_tokens": 8, "temperature": 0}
    answer = httpx.post(f"{node.api}/v1/completions", json=body, timeout=60)
    return answer.raise_for_status().json()["choices"][0]["text"]


def attack(
    node: LiveNode, mallory: Identity, how: Callable[[Links, Contact], Awaitable[None]]
) -> None:
    """Run `how` over an authenticated link, until the node has ended it."""
    contact = contact_of(node)

    async def run() -> None:
        lost = asyncio.Event()
        links = Links(mallory, [TlsCarrier(mallory, GENEROUS)], resolve=lambda _: contact)
        links.on(CHANNEL, lambda *_: None)
        links.on_lost(lambda *_: lost.set())
        async with links, asyncio.timeout(10):
            await links.connect(contact.node)
            await how(links, contact)
            await lost.wait()

    asyncio.run(run())


FRAMES = {
    "a channel that nobody listens on": Frame(7, b"hello"),
    "control that does not decode": Frame(0, b"\xff\xff"),
    "pipeline that does not decode": Frame(CHANNEL, b"\xc1" * 50),
    "a header that is too large": Frame(CHANNEL, b"x" * (65 << 10)),
    "a body that is too large": Frame(CHANNEL, b"", bytes((32 << 20) + 1)),
    "a session id that is a terminal escape": to_frame(Close(SessionId("\x1b[2J"))),
    "a token beyond every vocabulary": to_frame(
        Tokens((TokenEntry(SessionId("0" * 16), 0, Sampled(1 << 40)),))
    ),
}


@pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES.keys())
def test_a_bad_frame_costs_its_sender_the_link(node: LiveNode, frame: Frame) -> None:
    mallory = stranger()

    async def send(links: Links, victim: Contact) -> None:
        links.send(victim.node, frame)

    attack(node, mallory, send)
    assert faults(node)[mallory.node] == 1
    assert answers(node)


def test_another_version_costs_its_sender_the_link(node: LiveNode) -> None:
    mallory, before = stranger(), faults(node)

    async def dial() -> None:
        link = await TlsCarrier(mallory, GENEROUS).dial(contact_of(node))
        lost = asyncio.Event()
        link.start(lambda _: None, lambda _: lost.set())
        link._wire.write(b"\x00\x00\x00\x06\x63\x01\x00\x00\x00\x00")  # type: ignore[attr-defined]
        async with asyncio.timeout(10):
            await lost.wait()

    asyncio.run(dial())
    assert faults(node) == before | {mallory.node: 1}
    assert answers(node)


def test_a_card_without_its_key_gets_no_link(node: LiveNode) -> None:
    alice, mallory, before = stranger(), stranger(), faults(node).get("unproven", 0)
    impostor = SimpleNamespace(
        card=alice.card, node=alice.node, transport_key=alice.transport_key, sign=mallory.sign
    )
    with pytest.raises(LinkClosed):
        asyncio.run(TlsCarrier(cast(Identity, impostor), GENEROUS).dial(contact_of(node)))
    assert faults(node)["unproven"] == before + 1
    assert alice.node not in faults(node)


def test_valid_messages_in_any_order_are_survived(node: LiveNode) -> None:
    """As first and last stage, as gateway, with rows of NaN, with its own and with others' ids."""
    chance = random.Random(7)
    stage = node.status()["stages"][0]
    ids = [SessionId(f"{n:016x}") for n in range(4)]

    def message(mallory: Identity, victim: Contact) -> tuple[Message, bytes]:
        session = chance.choice(ids)
        known, around = chance.randint(1, 300), [victim.node, mallory.node, stranger().node]
        opened = Open(
            session=session,
            model=ModelId(stage["model"]),
            compute=stage["compute"],
            layers=Slice(0, 8),
            previous=chance.choice(around),
            next=chance.choice(around),
            known_tokens=known,
            reserve_tokens=known + chance.choice([0, 50, 1 << 20]),
            sampling=Sampling(seed=3, logprobs=20, max_tokens=50),
            patience_s=chance.choice([0.0, 1e9]),
        )
        token = TokenEntry(session, chance.randrange(3), Sampled(chance.randrange(600)))
        row = RowEntry(session, 0, chance.randint(1, 9))
        return chance.choice(
            [
                (opened, pack_ids([5] * known)),
                (Close(session), b""),
                (Tokens((token,)), b""),
                (Step((row,)), b"\xff\xff\xff\x7f" * 64 * row.count),
                (Lost(session, victim.node, "no"), b""),
            ]
        )

    async def send(links: Links, victim: Contact) -> None:
        for number in range(300):
            try:
                links.send(victim.node, to_frame(*message(mallory, victim)))
                await links.drain(victim.node)
            except LinkClosed:
                return  # it has had enough of us
            if number % 50 == 0:
                await asyncio.sleep(0)
        links.send(victim.node, Frame(CHANNEL, msgspec.msgpack.encode("the end")))

    before = answers(node)
    for _ in range(5):
        mallory = stranger()
        attack(node, mallory, send)
        assert faults(node)[mallory.node] >= 1
    assert answers(node) == before
    wait_for("the pages are back", lambda: node.status()["stages"][0]["pages_used"] == 0)
    assert "Traceback" not in node.stderr()
