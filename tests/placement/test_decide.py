"""Nobody is in charge: each decides by its own view, and together they cover the model."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.placement import Capacities, Member, ModelShape, Pool, decide
from shoal.placement.arrange import arrange, throughput
from shoal.placement.balance import ENOUGH, item_of, laid_of
from shoal.units import NodeId, Slice

from .meshes import MODEL, SmallMesh, at, random_pool
from .pools import AMBER, BIRCH, CEDAR, even, member, mixed_pools, picky_pools, roomy


def mesh_of(layers: int, *members: Member, whole: bool = False) -> SmallMesh:
    return SmallMesh(even(layers), {one.node: one for one in members}, whole)


@pytest.mark.parametrize("seeds", [range(start, start + 8) for start in range(0, 32, 8)], ids=str)
def test_a_random_pool_that_suffices_is_covered_in_any_order_of_coming_and_going(
    seeds: range,
) -> None:
    for seed in seeds:
        chance = random.Random(seed)
        mesh = random_pool(chance)
        pool, mesh.nodes = mesh.nodes, {}
        events = [*chance.sample(sorted(pool), len(pool)), *chance.choices(sorted(pool), k=5)]
        for node in events:
            mesh.come_or_go(node, pool[node])
            mesh.settle(chance, at_once=seed % 3 == 0)
            assert mesh.covered == mesh.coverable, f"seed {seed}"
            for one in mesh.nodes.values():
                assert one.layers is None or one.capacities.fits(one.layers, mesh.shape.layers)


@st.composite
def histories(draw: st.DrawFn) -> tuple[ModelShape, dict[NodeId, Capacities], list[NodeId]]:
    """Each event is a node: it comes if it is away, and leaves if it is there."""
    shape, nodes = draw(mixed_pools(max_nodes=7, max_layers=8) | picky_pools())
    events = draw(st.lists(st.sampled_from(list(nodes)), min_size=1, max_size=8))
    return shape, nodes, [*nodes, *events]


@given(histories(), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_tight_pools_are_covered_also_where_slices_have_to_meet(
    history: tuple[ModelShape, dict[NodeId, Capacities], list[NodeId]], at_once: bool, whole: bool
) -> None:
    shape, pool, events = history
    mesh, chance = SmallMesh(shape, whole=whole), random.Random(0)
    for node in events:
        mesh.come_or_go(node, Member(node, pool[node]))
        mesh.settle(chance, at_once=at_once)
        assert mesh.covered == mesh.coverable


@given(mixed_pools(max_nodes=7, max_layers=8))
@settings(max_examples=60, deadline=None)
def test_nodes_that_see_the_same_are_done_in_one_round(
    pool: tuple[ModelShape, dict[NodeId, Capacities]],
) -> None:
    shape, rooms = pool
    mesh = SmallMesh(shape, {node: Member(node, room) for node, room in rooms.items()})
    mesh.one_round(random.Random(0), at_once=True)
    assert mesh.covered == mesh.coverable


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_nodes_with_different_views_come_to_rest_once_they_agree(seed: int) -> None:
    chance = random.Random(seed)
    mesh = random_pool(chance, most_nodes=10)
    for _ in range(3):
        for node in sorted(mesh.nodes):
            seen = [one for one in mesh.nodes.values() if one.node == node or chance.random() < 0.6]
            mesh.hold(node, decide(node, mesh.pool(seen)).layers or mesh.nodes[node].layers)
    mesh.settle(chance)
    assert mesh.covered == mesh.coverable


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_the_order_in_which_one_heard_of_the_others_does_not_matter(seed: int) -> None:
    chance = random.Random(seed)
    mesh = random_pool(chance, most_nodes=8)
    for node in sorted(mesh.nodes)[::2]:
        mesh.hold(node, mesh.layers_for(node) or mesh.nodes[node].layers)
    for node in mesh.nodes:
        heard = list(mesh.nodes.values())
        chance.shuffle(heard)
        assert decide(node, mesh.pool(heard)) == mesh.decision(node)


def test_a_mesh_that_grew_node_by_node_carries_nearly_what_a_planned_one_would() -> None:
    for seed in range(12):
        chance = random.Random(seed)
        mesh = random_pool(chance, most_nodes=16)
        places = {node: replace(one, place=at(0)) for node, one in mesh.nodes.items()}
        mesh.nodes = {}
        for node in chance.sample(sorted(places), len(places)):
            mesh.nodes[node] = places[node]
            mesh.settle(chance)
        if not mesh.coverable:
            continue
        layers, members = mesh.shape.layers, list(mesh.nodes.values())
        items = [item_of(mesh.shape, one) for one in members]
        planned = throughput(layers, list(arrange(layers, items).values()))
        grown = throughput(layers, laid_of(mesh.shape, members))
        free_to_move = mesh.moves < 4 * len(members)
        assert free_to_move
        assert grown >= 0.6 * ENOUGH * planned, f"seed {seed}"


def test_a_newcomer_makes_nobody_move_in_a_mesh_that_is_good_enough() -> None:
    room = Capacities(4, 4, 4, 0)
    held = [member(AMBER, room, Slice(0, 4)), member(BIRCH, room, Slice(4, 8))]
    mesh = mesh_of(8, *held, member(CEDAR, room))
    assert mesh.layers_for(AMBER) == Slice(0, 4)
    assert mesh.layers_for(BIRCH) == Slice(4, 8)


def test_three_equal_nodes_share_a_model_too_big_for_two() -> None:
    room = Capacities(3, 3, 3, 0)
    mesh = mesh_of(8, *(member(node, room) for node in (AMBER, BIRCH, CEDAR)))
    mesh.one_round(random.Random(0), at_once=True)
    assert mesh.covered


def test_four_fast_nodes_that_start_together_take_equal_shares_although_more_would_fit() -> None:
    room = Capacities(18, 18, 18, 18)
    mesh = mesh_of(60, *(member(NodeId(f"n{i}"), room) for i in range(4)))
    mesh.one_round(random.Random(0), at_once=True)
    assert sorted(len(one.layers or ()) for one in mesh.nodes.values()) == [15, 15, 15, 15]


def test_what_is_loading_counts_for_the_next_to_choose() -> None:
    loading = replace(member(AMBER, Capacities(5, 5, 5, 0), Slice(0, 5)), state="joining")
    mesh = mesh_of(8, loading, member(BIRCH, Capacities(3, 3, 3, 0)))
    assert mesh.layers_for(BIRCH) == Slice(5, 8)


def test_a_pinned_node_keeps_its_layers_even_when_that_leaves_a_hole() -> None:
    pinned = Member(AMBER, roomy(8), Slice(2, 4), pinned=True)
    assert mesh_of(8, pinned).decision(AMBER).layers == Slice(2, 4)


def test_spare_nodes_spread_over_the_model() -> None:
    room = Capacities(4, 4, 4, 0)
    held = [member(AMBER, room, Slice(0, 4)), member(BIRCH, room, Slice(4, 8))]
    mesh = mesh_of(8, *held, member(CEDAR, room), member(NodeId("zebra"), room))
    chosen = [mesh.layers_for(node) for node in (CEDAR, NodeId("zebra"))]
    assert sorted(map(str, chosen)) == ["0:4", "4:8"]


def test_a_node_without_room_stays_free() -> None:
    tiny = member(AMBER, Capacities(0, 0, 0, 0))
    assert mesh_of(8, tiny, member(BIRCH, roomy(8), Slice(0, 8))).layers_for(AMBER) is None


def test_a_slow_node_joins_where_the_fast_ones_are_thin() -> None:
    room = Capacities(4, 4, 4, 4)
    held = [
        member(AMBER, room, Slice(0, 4)),
        member(BIRCH, room, Slice(0, 4)),
        member(CEDAR, room, Slice(4, 8)),
    ]
    assert mesh_of(8, *held, member(NodeId("dove"), room)).layers_for(NodeId("dove")) == Slice(4, 8)


def test_a_region_with_room_for_the_whole_model_covers_it_alone() -> None:
    for seed in range(6):
        chance = random.Random(seed)
        room = Capacities(4, 4, 4, 0)
        nodes = [NodeId(f"n{i:02}") for i in range(12)]
        homes = {node: i % 2 for i, node in enumerate(nodes)}
        mesh = mesh_of(16)
        for node in chance.sample(nodes, len(nodes)):
            mesh.nodes[node] = replace(member(node, room), place=at(homes[node], chance))
            mesh.settle(chance)
        for region in (0, 1):
            here = [one for one in mesh.nodes.values() if homes[one.node] == region]
            assert SmallMesh(mesh.shape, {one.node: one for one in here}).covered, f"seed {seed}"


def test_regions_too_small_for_the_model_hold_one_run_of_layers_each() -> None:
    room = Capacities(4, 4, 4, 0)
    members = [replace(member(NodeId(f"n{i}"), room), place=at(i // 3)) for i in range(6)]
    mesh = mesh_of(24, *members)
    mesh.one_round(random.Random(0), at_once=True)
    assert mesh.covered
    for region in (members[:3], members[3:]):
        starts = sorted(mesh.nodes[one.node].layers or Slice(0, 1) for one in region)
        assert starts[0].stop == starts[1].start
        assert starts[1].stop == starts[2].start


def test_those_who_want_the_same_act_one_after_the_other() -> None:
    room = Capacities(4, 4, 4, 0)
    free = [member(NodeId(f"n{i}"), room) for i in range(5)]
    mesh = mesh_of(8, member(AMBER, room, Slice(0, 4)), *free)
    waits = sorted(mesh.decision(one.node).wait_s for one in free)
    assert waits[0] == 0.0
    assert len(set(waits)) == len(waits)
    assert mesh.decision(AMBER).wait_s == 0.0
    assert [mesh.decision(one.node) for one in free] == [mesh.decision(one.node) for one in free]


def test_a_node_with_nothing_to_offer_is_told_so() -> None:
    decision = decide(AMBER, Pool((), {MODEL: ()}))
    assert decision.layers is None
    assert decision.reason
