"""How far apart nodes are: measured, estimated, assumed."""

from __future__ import annotations

import random

import pytest

from shoal.bus import Announcement
from shoal.bus.coordinates import Coordinates
from shoal.node.distances import NEARBY_S, UNKNOWN_S, Distances
from shoal.units import NodeId
from tests.bus.nodes import AMBER, BIRCH, CORAL, announcement

A, B, C = AMBER.node, BIRCH.node, CORAL.node


def distances(
    *said: Announcement, rtts: dict[NodeId, float] | None = None, me: NodeId = A
) -> Distances:
    by_node = {each.node: each for each in said}
    return Distances(me, by_node.get, (rtts or {}).get, chance=random.Random(1))


def test_what_was_measured_counts_for_ways_of_our_own() -> None:
    known = distances(announcement(BIRCH), rtts={B: 0.03})
    assert known.latency(A, B) == known.latency(B, A) == pytest.approx(0.015)
    assert known.latency(A, A) == 0


def test_ways_between_others_are_estimated_from_where_they_say_they_are() -> None:
    birch = announcement(BIRCH, place=Coordinates((0.02, 0.0, 0.0), 0.001, 0.2))
    coral = announcement(CORAL, place=Coordinates((0.05, 0.04, 0.0), 0.002, 0.2))
    assert distances(birch, coral).latency(B, C) == pytest.approx(0.053)


def test_who_does_not_know_its_place_is_assumed_to_be_far_away() -> None:
    birch = announcement(BIRCH, place=Coordinates((0.02, 0.0, 0.0), 0.001, 0.2))
    coral = announcement(CORAL, addresses=("203.0.113.5:7472",))
    assert distances(birch, coral).latency(B, C) == UNKNOWN_S
    assert distances(birch).latency(B, C) == UNKNOWN_S


@pytest.mark.parametrize(
    ("ours", "theirs", "near"),
    [
        (("127.0.0.1:1",), ("127.0.0.1:2",), True),
        (("192.168.1.2:1",), ("192.168.1.77:2",), True),
        (("192.168.1.2:1",), ("192.168.2.77:2",), False),
        (("192.168.1.2:1", "8.8.8.8:1"), ("192.168.1.77:2",), False),
        (("[fe80::1]:1", "10.0.0.1:1"), ("[fe80::2]:2",), True),
        (("some.host:1",), ("some.host:2",), False),
        ((), (), False),
    ],
)
def test_nodes_of_one_local_network_are_near(
    ours: tuple[str, ...], theirs: tuple[str, ...], near: bool
) -> None:
    known = distances(announcement(BIRCH, addresses=ours), announcement(CORAL, addresses=theirs))
    assert known.latency(B, C) == (NEARBY_S if near else UNKNOWN_S)
    known = distances(announcement(BIRCH, addresses=theirs))
    known.addresses = ours
    assert known.latency(A, B) == (NEARBY_S if near else UNKNOWN_S)


def test_a_measurement_moves_our_own_place() -> None:
    known = distances(announcement(BIRCH, place=Coordinates((0.0, 0.0, 0.0), 1e-4, 0.1)))
    for _ in range(60):
        known.learn(B, 0.04)
    assert known.place.measured
    assert known.latency(A, B) == pytest.approx(0.02, rel=0.1)
    before = known.place
    known.learn(C, 0.5)  # nobody has announced it
    assert known.place == before
