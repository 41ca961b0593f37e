"""Whom a node measures before it has any work."""

from __future__ import annotations

import asyncio
import hashlib
import random
import statistics

import pytest

from shoal.bus import MeshView
from shoal.bus.coordinates import Coordinates
from shoal.identity import Identity
from shoal.node.distances import Distances
from shoal.node.survey import ENOUGH, Surveyor, spread
from shoal.sim.loop import run
from shoal.transport import Contact, Links, MemoryConfig, MemoryNetwork
from shoal.units import NodeId
from tests.bus.nodes import AMBER, announcement

CROWD = [Identity.from_secret(hashlib.sha256(b"s%d" % n).digest()) for n in range(12)]


def test_half_are_the_nearest_and_half_come_by_lot() -> None:
    others = [announcement(who) for who in CROWD]
    ways = {who.node: number / 100 for number, who in enumerate(CROWD)}

    def chosen(seed: int) -> list[NodeId]:
        return spread(AMBER.node, others, 6, lambda a, b: ways[b], random.Random(seed))

    assert chosen(1)[:3] == [who.node for who in CROWD[:3]]
    assert len(set(chosen(1))) == 6
    assert chosen(1) == chosen(1)
    assert chosen(1)[3:] != chosen(2)[3:]


@pytest.mark.parametrize(("count", "expected"), [(-3, 0), (0, 0), (1, 1), (50, 12)])
def test_no_more_are_chosen_than_there_are_or_than_are_wanted(count: int, expected: int) -> None:
    others = [announcement(who) for who in CROWD]
    chance = random.Random(1)
    assert len(spread(AMBER.node, others, count, lambda a, b: 0.0, chance)) == expected


def test_a_survey_measures_a_few_and_leaves_no_link_behind() -> None:
    async def world() -> None:
        network = MemoryNetwork(MemoryConfig(delay_s=0.02), seed=1)
        contacts: dict[NodeId, Contact] = {}
        links = {
            who.node: Links(who, [network.carrier(who)], resolve=contacts.get)
            for who in [AMBER, *CROWD]
        }
        lost: list[NodeId] = []
        view = MeshView(AMBER.node)
        for who in [AMBER, *CROWD]:
            mine = links[who.node]
            mine.on_lost(lambda node, reason: lost.append(node))
            await mine.__aenter__()
            contacts[who.node] = Contact(who.node, who.transport_key, mine.addresses)
            view.apply(announcement(who, place=Coordinates(error=0.2)), 0.0)
        view.remove(AMBER.node)
        amber, chance = links[AMBER.node], random.Random(1)
        distances = Distances(AMBER.node, view.get, amber.rtt, chance=chance)
        amber.on_rtt(distances.learn)
        surveyor = Surveyor(AMBER.node, view, amber, distances.latency, chance=chance)
        await surveyor.survey(ENOUGH)
        rtts = [rtt for who in CROWD if (rtt := amber.rtt(who.node)) is not None]
        assert len(rtts) == ENOUGH
        assert statistics.median(rtts) == pytest.approx(0.04, rel=0.1)
        assert distances.place.measured
        await asyncio.sleep(0.1)  # until the last one has heard of it
        for mine in links.values():
            assert mine.peers() == []
        assert lost == []
        for mine in links.values():
            await mine.aclose()

    run(world, limit_s=60.0)
