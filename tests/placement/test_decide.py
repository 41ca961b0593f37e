"""A mesh without a scheduler: nodes come, go and come back, and each decides for itself."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.placement import Capacities, Member, ModelShape, coverable, covered
from shoal.placement.decide import choose_layers as decide
from shoal.units import NodeId, Slice

from .pools import AMBER, BIRCH, CEDAR, even, member, mixed_pools, picky_pools, roomy

Nodes = dict[NodeId, Member]


def is_covered(shape: ModelShape, nodes: Nodes) -> bool:
    return covered(shape.layers, [one.layers for one in nodes.values() if one.layers])


def decide_in_turn(shape: ModelShape, nodes: Nodes) -> bool:
    """Each node decides on what it sees after the ones before it. True when something changed."""
    changed = False
    for node in list(nodes):
        chosen = decide(shape, node, list(nodes.values()))
        changed |= chosen != nodes[node].layers
        nodes[node] = replace(nodes[node], layers=chosen)
    return changed


def decide_at_once(shape: ModelShape, nodes: Nodes) -> bool:
    """All decide on the same view. True when something changed."""
    seen = list(nodes.values())
    chosen = {node: decide(shape, node, seen) for node in nodes}
    changed = any(chosen[node] != nodes[node].layers for node in nodes)
    nodes.update({node: replace(one, layers=chosen[node]) for node, one in nodes.items()})
    return changed


def settle(shape: ModelShape, nodes: Nodes, *, in_turn: bool) -> None:
    """Let everybody decide until nobody wants a change."""
    rounds = 2 * len(nodes) + 2
    step = decide_in_turn if in_turn else decide_at_once
    assert any(not step(shape, nodes) for _ in range(rounds)), "the nodes do not come to rest"


@st.composite
def histories(draw: st.DrawFn) -> tuple[ModelShape, dict[NodeId, Capacities], list[NodeId]]:
    """Each event is a node: it comes if it is away, and leaves if it is there."""
    shape, nodes = draw(mixed_pools(max_nodes=7, max_layers=8) | picky_pools())
    events = draw(st.lists(st.sampled_from(list(nodes)), min_size=1, max_size=14))
    return shape, nodes, [*nodes, *events]


@given(histories(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_pool_that_suffices_is_covered_in_any_order_of_coming_and_going(
    history: tuple[ModelShape, dict[NodeId, Capacities], list[NodeId]], in_turn: bool
) -> None:
    shape, pool, events = history
    nodes: Nodes = {}
    for node in events:
        if node in nodes:
            del nodes[node]
        else:
            nodes[node] = Member(node, pool[node])
        settle(shape, nodes, in_turn=in_turn)
        rooms = [one.capacities for one in nodes.values()]
        assert is_covered(shape, nodes) == coverable(shape.layers, rooms)
        for one in nodes.values():
            assert one.layers is None or one.capacities.fits(one.layers, shape.layers)


@given(mixed_pools(max_nodes=7, max_layers=8))
@settings(max_examples=80, deadline=None)
def test_nodes_that_see_the_same_are_done_in_one_round(
    pool: tuple[ModelShape, dict[NodeId, Capacities]],
) -> None:
    shape, rooms = pool
    nodes = {node: Member(node, room) for node, room in rooms.items()}
    decide_at_once(shape, nodes)
    assert is_covered(shape, nodes) == coverable(shape.layers, list(rooms.values()))


@given(histories(), st.data())
@settings(max_examples=60, deadline=None)
def test_nobody_moves_while_a_route_exists(
    history: tuple[ModelShape, dict[NodeId, Capacities], list[NodeId]], data: st.DataObject
) -> None:
    shape, pool, _ = history
    nodes = {node: Member(node, room) for node, room in pool.items()}
    settle(shape, nodes, in_turn=True)
    if not is_covered(shape, nodes):
        return
    newcomer = Member(NodeId("newcomer"), data.draw(st.sampled_from(list(pool.values()))))
    for node, one in nodes.items():
        assert decide(shape, node, [*nodes.values(), newcomer]) == one.layers


def test_three_equal_nodes_share_a_model_too_big_for_two() -> None:
    room = Capacities(3, 3, 3, 0)
    nodes = {node: member(node, room) for node in (AMBER, BIRCH, CEDAR)}
    decide_at_once(even(8), nodes)
    assert is_covered(even(8), nodes)
    assert sorted(len(one.layers or ()) for one in nodes.values()) == [2, 3, 3]


def test_what_is_loading_counts_for_the_next_to_choose() -> None:
    loading = member(AMBER, roomy(8), Slice(0, 8))
    small = member(BIRCH, Capacities(3, 3, 3, 0))
    assert decide(even(8), BIRCH, [loading, small]) == Slice(0, 3)


def test_a_pinned_node_keeps_its_layers_even_when_that_leaves_a_hole() -> None:
    pinned = Member(AMBER, roomy(8), Slice(2, 4), pinned=True)
    assert decide(even(8), AMBER, [pinned]) == Slice(2, 4)


def test_spare_nodes_spread_over_the_model() -> None:
    room = Capacities(4, 4, 4, 0)
    held = [member(AMBER, room, Slice(0, 4)), member(BIRCH, room, Slice(4, 8))]
    free = [member(CEDAR, room), member(NodeId("zebra"), room)]
    chosen = [decide(even(8), one.node, held + free) for one in free]
    assert chosen == [Slice(0, 4), Slice(4, 8)]


def test_a_node_without_room_stays_free() -> None:
    tiny = member(AMBER, Capacities(0, 0, 0, 0))
    assert decide(even(8), AMBER, [tiny, member(BIRCH, roomy(8), Slice(0, 8))]) is None
