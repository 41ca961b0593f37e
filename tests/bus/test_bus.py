"""What every bus must do: each test runs over memory and over real Nostr relays."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from shoal.bus.base import MAX_PAYLOAD_BYTES
from shoal.errors import BadConfig, InvalidRequest, LinkClosed
from shoal.events import Event, RelayChanged
from shoal.identity import Mesh

from .nodes import AMBER, BIRCH, CORAL, SECRET_CLUB, Ear, announcement
from .worlds import WORLDS, World

pytestmark = pytest.mark.anyio


@pytest.fixture(params=WORLDS, ids=["memory", "nostr"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    made = request.param()
    yield made
    await made.close()


async def test_nodes_hear_each_other_but_not_themselves(world: World) -> None:
    url = await world.relay()
    amber, birch = world.bus(AMBER, url), world.bus(BIRCH, url)
    ear_a, ear_b = Ear().at(amber), Ear().at(birch)
    async with amber, birch:
        said = announcement(AMBER)
        await amber.announce(said)
        await birch.announce(announcement(BIRCH))
        await ear_b.until(lambda: ear_b.announced == [said])
        await ear_a.until(lambda: ear_a.heard() == [(BIRCH.node, 1)])
        assert not amber.dropped
        assert not birch.dropped


async def test_a_late_joiner_hears_who_is_there_and_only_the_newest_of_each(world: World) -> None:
    url = await world.relay()
    async with world.bus(AMBER, url) as amber, world.bus(BIRCH, url) as birch:
        for sequence in (1, 2, 3):
            await amber.announce(announcement(AMBER, sequence))
        await birch.announce(announcement(BIRCH))
        witness = world.bus(CORAL, url)
        ear = Ear().at(witness)
        async with witness:
            await ear.until(lambda: {AMBER.node, BIRCH.node} == {n for n, _ in ear.heard()})
            assert ear.heard()[-1] == (BIRCH.node, 1) or ear.heard()[0] == (BIRCH.node, 1)
            assert max(ear.heard(), key=lambda heard: heard[1]) == (AMBER.node, 3)


async def test_a_goodbye_is_seen_at_once_and_late_joiners_do_not_see_the_node(
    world: World,
) -> None:
    url = await world.relay()
    amber, birch = world.bus(AMBER, url), world.bus(BIRCH, url)
    ear = Ear().at(birch)
    async with amber, birch:
        await amber.announce(announcement(AMBER))
        await ear.until(lambda: len(ear.announced) == 1)
        await amber.withdraw()
        await ear.until(lambda: ear.gone == [AMBER.node], timeout_s=1)
        await birch.announce(announcement(BIRCH))
        late = world.bus(CORAL, url)
        late_ear = Ear().at(late)
        async with late:
            await late_ear.until(lambda: late_ear.heard() == [(BIRCH.node, 1)])
        await amber.announce(announcement(AMBER, 2))
        await ear.until(lambda: ear.heard()[-1] == (AMBER.node, 2))


async def test_a_sealed_message_reaches_its_receiver_alone(world: World) -> None:
    url = await world.relay()
    buses = [world.bus(who, url) for who in (AMBER, BIRCH, CORAL)]
    ears = [Ear().at(bus) for bus in buses]
    payload = bytes(range(256)) * (MAX_PAYLOAD_BYTES // 256)
    async with buses[0], buses[1], buses[2]:
        await buses[0].send_sealed(BIRCH.node, b"hello")
        await buses[0].send_sealed(BIRCH.node, payload)
        expected = [(AMBER.node, b"hello"), (AMBER.node, payload)]
        await ears[1].until(lambda: sorted(ears[1].sealed) == sorted(expected))
        await buses[1].send_sealed(CORAL.node, b"done")
        await ears[2].until(lambda: ears[2].sealed == [(BIRCH.node, b"done")])
        assert ears[0].sealed == []
        with pytest.raises(InvalidRequest, match="too large"):
            await buses[0].send_sealed(BIRCH.node, payload + b"x")


async def test_a_private_mesh_hears_its_members_only(world: World) -> None:
    url = await world.relay()
    other = Mesh(SECRET_CLUB.topic, "a thief of the topic", secret=b"t" * 32, _key=b"t" * 32)
    member, thief = world.bus(AMBER, url, mesh=SECRET_CLUB), world.bus(BIRCH, url, mesh=other)
    witness = world.bus(CORAL, url, mesh=SECRET_CLUB)
    ear = Ear().at(witness)
    async with member, thief, witness:
        await thief.announce(announcement(BIRCH))
        await thief.send_sealed(CORAL.node, b"let me in")
        await ear.until(lambda: witness.dropped["bad_proof"] == 2)
        await member.announce(announcement(AMBER))
        await member.send_sealed(CORAL.node, b"hello")
        await ear.until(lambda: ear.heard() == [(AMBER.node, 1)] and len(ear.sealed) == 1)
        assert ear.sealed == [(AMBER.node, b"hello")]


async def test_a_relay_killed_and_returned_is_noticed_and_gets_the_announcement_again(
    world: World,
) -> None:
    url, events, ear = await world.relay(), list[Event](), Ear()
    amber = world.bus(AMBER, url, emit=events.append)
    async with amber:
        await amber.announce(announcement(AMBER))
        await world.stop(url)
        await ear.until(lambda: not amber.status()[0].connected)
        assert amber.status()[0].error
        await amber.announce(announcement(AMBER, 2))  # nobody hears; nothing breaks
        with pytest.raises(LinkClosed):
            await amber.send_sealed(BIRCH.node, b"hello?")
        await world.start(url)
        await ear.until(lambda: amber.status()[0].connected)
        assert events == [RelayChanged(url, connected=up) for up in (True, False, True)]
        late = world.bus(BIRCH, url)
        ear.at(late)
        async with late:
            await ear.until(lambda: ear.heard() == [(AMBER.node, 2)])


async def test_a_subscriber_hears_again_after_its_relay_returned(world: World) -> None:
    url = await world.relay()
    birch = world.bus(BIRCH, url)
    ear = Ear().at(birch)
    async with birch:
        await world.stop(url)
        await ear.until(lambda: not birch.status()[0].connected)
        await world.start(url)
        await ear.until(lambda: birch.status()[0].connected)
        async with world.bus(AMBER, url) as amber:
            await amber.announce(announcement(AMBER))
            await ear.until(lambda: ear.heard() == [(AMBER.node, 1)])


async def test_a_dead_relay_delays_nothing_and_the_other_one_serves(world: World) -> None:
    dead, alive = await world.relay(), await world.relay()
    await world.stop(dead)
    started = time.perf_counter()
    amber, birch = world.bus(AMBER, dead, alive), world.bus(BIRCH, alive, dead)
    ear = Ear().at(birch)
    async with amber, birch:
        assert time.perf_counter() - started < 1
        await amber.announce(announcement(AMBER))
        await ear.until(lambda: ear.heard() == [(AMBER.node, 1)])
        assert {(s.url, s.connected) for s in amber.status()} == {(dead, False), (alive, True)}
        assert amber.urls == (dead, alive)


async def test_a_note_that_comes_over_two_relays_is_heard_once(world: World) -> None:
    urls = await world.relay(), await world.relay()
    amber, birch = world.bus(AMBER, *urls), world.bus(BIRCH, *urls)
    ear = Ear().at(birch)
    async with amber, birch:
        await ear.until(lambda: all(s.connected for s in (*amber.status(), *birch.status())))
        for sequence in (1, 2):
            await amber.announce(announcement(AMBER, sequence))
        await amber.send_sealed(BIRCH.node, b"once")
        await amber.withdraw()
        await ear.until(lambda: len(ear.gone) == 1 and len(ear.sealed) == 1)
        assert [sequence for _, sequence in ear.heard()] == [1, 2]
        assert not birch.dropped


async def test_a_relay_can_be_added_later_and_gets_our_announcement(world: World) -> None:
    first, second = await world.relay(), await world.relay()
    amber, birch = world.bus(AMBER, first), world.bus(BIRCH, second)
    ear = Ear().at(birch)
    async with amber, birch:
        await amber.announce(announcement(AMBER))
        await amber.add_relay(second)
        await amber.add_relay(second)
        assert amber.urls == (first, second)
        await ear.until(lambda: ear.heard() == [(AMBER.node, 1)])


async def test_what_is_no_relay_is_refused(world: World) -> None:
    async with world.bus(AMBER) as amber:
        assert amber.status() == []
        for url in ("http://host", "ws://", "nonsense"):
            with pytest.raises(BadConfig):
                await amber.add_relay(url)
        await amber.announce(announcement(AMBER))
        await amber.withdraw()


async def test_a_bus_leaves_no_task_behind(world: World) -> None:
    url = await world.relay()
    before = asyncio.all_tasks()
    async with world.bus(AMBER, url) as amber:
        await amber.announce(announcement(AMBER))
    with pytest.raises(KeyError, match="mine"):
        async with world.bus(AMBER, url):
            raise KeyError("mine")
    assert asyncio.all_tasks() == before


@pytest.mark.parametrize(
    ("reason", "author", "content", "age"),
    [
        ("from the future", BIRCH, announcement(BIRCH).encode(), -120),
        ("from the future", BIRCH, announcement(BIRCH, sent_at=1 << 40).encode(), 0),
        ("too old", BIRCH, announcement(BIRCH, sent_at=1000).encode(), 0),
        ("card of another node", BIRCH, announcement(CORAL).encode(), 0),
        ("bad_message", BIRCH, b"not json", 0),
        ("bad_message", BIRCH, b"[" * 10_000, 0),
        ("bad_message", BIRCH, b"{}", 0),
        ("too large", BIRCH, b"x" * 30_000, 0),
        ("bad_message", BIRCH, b" " * 17_000, 0),
        (
            "bad_proof",
            BIRCH,
            msgspec.json.encode(replace(announcement(BIRCH), sequence=2)),
            0,
        ),
        ("bad_proof", BIRCH, announcement(BIRCH).sign(CORAL).encode(), 0),
        (
            "bad_proof",
            BIRCH,
            announcement(BIRCH, card=replace(CORAL.card, node=BIRCH.node)).encode(),
            0,
        ),
    ],
)
async def test_what_a_stranger_should_not_say_is_dropped_and_counted(
    world: World, reason: str, author: Any, content: bytes, age: int
) -> None:
    url, now = await world.relay(), int(time.time())
    witness = world.bus(AMBER, url)
    ear = Ear().at(witness)
    async with witness:
        await world.inject(url, author, content.decode(), created_at=now - age)
        await ear.until(lambda: witness.dropped.total() == 1)
        assert witness.dropped == {reason: 1}
        async with world.bus(CORAL, url) as honest:
            await honest.announce(announcement(CORAL))
            await ear.until(lambda: ear.heard() == [(CORAL.node, 1)])


async def test_a_relay_that_was_down_at_the_start_is_used_once_it_is_up(world: World) -> None:
    url, ear = await world.relay(), Ear()
    await world.stop(url)
    amber, birch = world.bus(AMBER, url), world.bus(BIRCH, url)
    ear.at(birch)
    async with amber, birch:
        await amber.announce(announcement(AMBER))
        assert not amber.status()[0].connected
        await world.start(url)
        await ear.until(lambda: ear.heard() == [(AMBER.node, 1)])
        await birch.send_sealed(AMBER.node, b"found you")
