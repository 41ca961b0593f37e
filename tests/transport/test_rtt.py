"""How far away a peer is, by its answers."""

from __future__ import annotations

import asyncio
import random

import pytest

from shoal.events import LinkLost, LinkUp
from shoal.transport import Frame, HeartbeatConfig, LinksConfig, MemoryConfig
from shoal.transport.rtt import EAGER_PINGS, PING_S, Probes, Rtt
from shoal.units import NodeId
from tests.transport.nodes import AMBER, BIRCH, CHANNEL, open_mesh, until

QUICK = LinksConfig(heartbeat=HeartbeatConfig(beat_after_s=0.02))
NODE = NodeId("npub1amber")


def test_what_delays_single_pings_does_not_make_a_peer_seem_far() -> None:
    chance, rtt = random.Random(1), Rtt()
    for _ in range(100):
        rtt.measured(0.04 + (chance.expovariate(20) if chance.random() < 0.4 else 0.0))
    assert rtt.seconds == pytest.approx(0.04, rel=0.05)


def test_a_way_that_became_longer_is_noticed() -> None:
    rtt = Rtt()
    for sample in [0.01] * 20 + [0.05] * 30:
        rtt.measured(sample)
    assert rtt.seconds == pytest.approx(0.05, rel=0.05)


def test_impossible_times_are_left_out() -> None:
    rtt = Rtt()
    for sample in (-1.0, 1e9, float("nan")):
        rtt.measured(sample)
    assert rtt.seconds is None


def test_a_new_link_is_asked_a_few_times_and_then_seldom() -> None:
    probes, asked = Probes(), 0
    probes.fresh(NODE)
    for tick in range(100):
        stamp = probes.ask(NODE, tick * PING_S / 50)
        if stamp is not None:
            probes.answered(NODE, stamp, tick * PING_S / 50 + 0.01)
            asked += 1
    assert asked == EAGER_PINGS + 1


def test_an_answer_that_takes_long_is_waited_for() -> None:
    probes = Probes()
    probes.fresh(NODE)
    first = probes.ask(NODE, 1.0)
    assert first is not None
    assert probes.ask(NODE, 1.25) is None
    assert probes.answered(NODE, first, 1.4) == pytest.approx(0.4)
    assert probes.ask(NODE, 1.5) is not None


def test_only_the_answer_to_what_we_asked_last_counts_and_only_once() -> None:
    probes = Probes()
    first, second = probes.ask(NODE, 1.0), probes.ask(NODE, 1.0 + PING_S)
    assert first is not None
    assert second is not None
    assert probes.answered(NODE, first, 7.0) is None
    assert probes.answered(NODE, second, 1.5 + PING_S) == pytest.approx(0.5)
    assert probes.answered(NODE, second, 9.0) is None
    assert probes.answered(NodeId("npub1stranger"), 5, 9.0) is None
    assert probes.rtt(NODE) == pytest.approx(0.5)


@pytest.mark.anyio
async def test_both_ends_of_a_link_know_how_long_it_is_and_remember_it() -> None:
    async with open_mesh("memory", MemoryConfig(delay_s=0.01)) as mesh:
        amber, birch = await mesh.node(AMBER, QUICK), await mesh.node(BIRCH, QUICK)
        heard: list[float] = []
        amber.links.on_rtt(lambda node, seconds: heard.append(seconds))
        await amber.links.connect(birch.id)
        await until(lambda: amber.links.rtt(birch.id) and birch.links.rtt(amber.id))
        assert 0.02 <= (amber.links.rtt(birch.id) or 0) < 0.04
        assert heard[0] == amber.links.rtt(birch.id) or len(heard) > 1
        amber.links.drop(birch.id, "enough")
        assert amber.links.rtt(birch.id)
        assert amber.links.rtt(amber.id) == 0


@pytest.mark.anyio
async def test_a_link_that_carried_nothing_ends_without_a_loss() -> None:
    async with open_mesh("memory") as mesh:
        amber, birch = await mesh.node(AMBER), await mesh.node(BIRCH)
        await amber.links.connect(birch.id)
        await until(lambda: birch.links.peers())
        amber.links.part(birch.id)
        await until(lambda: not birch.links.peers())
        assert amber.lost == birch.lost == []
        assert [type(event) for event in birch.events] == [LinkUp, LinkLost]
        await birch.links.connect(amber.id)  # and it can be had again


@pytest.mark.anyio
async def test_a_link_that_is_in_use_does_not_part() -> None:
    async with open_mesh("memory") as mesh:
        amber, birch = await mesh.node(AMBER), await mesh.node(BIRCH)
        amber.links.send(birch.id, Frame(CHANNEL, b"header", b"work"))
        await until(lambda: birch.frames)
        amber.links.part(birch.id)
        birch.links.part(amber.id)
        await asyncio.sleep(0)
        assert amber.links.is_connected(birch.id)


@pytest.mark.anyio
async def test_what_was_sent_into_a_parting_link_is_reported_as_lost() -> None:
    async with open_mesh("memory", MemoryConfig(delay_s=0.01)) as mesh:
        amber, birch = await mesh.node(AMBER), await mesh.node(BIRCH)
        await amber.links.connect(birch.id)
        await until(lambda: birch.links.peers())
        birch.links.send(amber.id, Frame(CHANNEL, b"header", b"work"))
        amber.links.part(birch.id)
        await until(lambda: birch.lost)
        assert amber.lost == []
