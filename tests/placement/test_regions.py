from __future__ import annotations

import random
from dataclasses import replace

from shoal.bus.coordinates import Coordinates
from shoal.placement import Capacities, Member
from shoal.placement.regions import regions, territories
from shoal.units import NodeId, Slice

from .meshes import at
from .pools import even, member

ROOM = Capacities(4, 4, 4, 0)


def nodes(*homes: int, seed: int = 0) -> list[Member]:
    chance = random.Random(seed)
    members = [
        replace(member(NodeId(f"n{i:02}"), ROOM), place=at(home, chance))
        for i, home in enumerate(homes)
    ]
    chance.shuffle(members)
    return members


def names(found: list[list[Member]]) -> list[list[str]]:
    return sorted([one.node for one in region] for region in found)


def test_nodes_are_grouped_by_where_they_are_in_whatever_order_they_were_heard_of() -> None:
    expected = [["n00", "n03", "n05"], ["n01", "n04"], ["n02"]]
    for seed in range(5):
        assert names(regions(nodes(0, 1, 2, 0, 1, 0, seed=seed))) == expected


def test_one_site_is_one_region() -> None:
    assert len(regions(nodes(*[0] * 20))) == 1
    assert len(regions([replace(one, place=Coordinates()) for one in nodes(*[0] * 5)])) == 1


def test_who_has_measured_nothing_yet_belongs_to_the_largest_region() -> None:
    new = replace(member(NodeId("new"), ROOM), place=Coordinates())
    found = regions([*nodes(0, 0, 0, 1), new])
    assert names(found) == [["n00", "n01", "n02", "new"], ["n03"]]


def test_a_region_with_room_for_all_layers_holds_all_of_them() -> None:
    found = regions(nodes(0, 0, 0, 0, 1, 1))
    grounds = territories(even(12), found)
    by_size = dict(zip(map(len, found), grounds, strict=True))
    assert by_size[4] == Slice(0, 12)
    assert len(by_size[2]) <= 8


def test_regions_that_need_each_other_share_the_layers_out() -> None:
    grounds = territories(even(24), regions(nodes(0, 0, 0, 1, 1, 1)))
    assert sorted(grounds) == [Slice(0, 12), Slice(12, 24)]


def test_a_hundred_regions_are_told_apart() -> None:
    assert len(regions(nodes(*(i % 100 for i in range(400))))) == 100
