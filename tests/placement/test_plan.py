from __future__ import annotations

from itertools import product
from time import perf_counter

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.placement import Capacities, Member, ModelShape, coverable, covered, plan
from shoal.units import NodeId, Slice

from .pools import AMBER, BIRCH, CEDAR, even, member, mixed_pools, picky_pools, roomy, slices


def bytes_moved(shape: ModelShape, members: list[Member], slices: dict[NodeId, Slice]) -> int:
    """By nodes that serve: one that is free loads something anyway."""
    return sum(shape.moved_bytes(slices[one.node], one.layers) for one in members if one.layers)


def fewest_bytes(shape: ModelShape, members: list[Member], *, whole: bool) -> int | None:
    """Try every slice on every node."""
    options: list[list[Slice | None]] = [
        [one.layers]
        if one.pinned
        else [
            one.layers,
            *(part for part in slices(shape.layers) if one.capacities.fits(part, shape.layers)),
        ]
        for one in members
    ]
    costs = [
        sum(
            shape.moved_bytes(part, one.layers)
            for one, part in zip(members, parts, strict=True)
            if part and one.layers
        )
        for parts in product(*options)
        if covered(shape.layers, [part for part in parts if part], whole=whole)
    ]
    return min(costs, default=None)


def test_a_gap_that_nobody_free_can_fill_makes_a_neighbour_grow() -> None:
    members = [member(AMBER, roomy(8), Slice(0, 3)), member(BIRCH, roomy(8), Slice(4, 8))]
    found = plan(even(8), members)
    assert found is not None
    assert bytes_moved(even(8), members, found) == 10
    assert covered(8, found.values())


def test_overlapping_slices_are_trimmed_where_they_can_only_be_run_whole() -> None:
    members = [member(AMBER, roomy(8), Slice(0, 5)), member(BIRCH, roomy(8), Slice(3, 8))]
    found = plan(even(8), members, whole=True)
    assert found is not None
    assert covered(8, found.values(), whole=True)
    assert bytes_moved(even(8), members, found) == 0
    assert plan(even(8), members) == {AMBER: Slice(0, 5), BIRCH: Slice(3, 8)}


def test_who_has_to_grow_keeps_what_it_holds_where_that_fits() -> None:
    members = [
        member(AMBER, Capacities(4, 4, 4, 0), Slice(0, 3)),
        Member(BIRCH, roomy(8), Slice(4, 8), pinned=True),
    ]
    assert plan(even(8), members) == {AMBER: Slice(0, 4), BIRCH: Slice(4, 8)}


def test_someone_in_the_middle_shifts_when_no_joiner_spans_both_holes() -> None:
    room = Capacities(2, 2, 2, 2)
    members = [
        member(AMBER, room, Slice(1, 3)),
        member(BIRCH, room, Slice(4, 6)),
        member(CEDAR, room),
    ]
    found = plan(even(6), members)
    assert found is not None
    assert covered(6, found.values())


def test_a_pinned_node_stays_where_it_is() -> None:
    pinned = Member(AMBER, roomy(8), Slice(2, 5), pinned=True)
    members = [pinned, member(BIRCH, roomy(8)), member(CEDAR, Capacities(3, 3, 3, 3))]
    found = plan(even(8), members)
    assert found is not None
    assert found[AMBER] == Slice(2, 5)
    assert covered(8, found.values())


def test_equal_nodes_get_equal_shares_where_all_are_needed() -> None:
    members = [member(NodeId(f"n{i}"), Capacities(4, 4, 4, 4)) for i in range(3)]
    found = plan(even(9), members)
    assert found is not None
    assert sorted(found.values()) == [Slice(0, 3), Slice(3, 6), Slice(6, 9)]


def test_of_two_equally_cheap_plans_the_one_that_moves_fewer_nodes_is_made() -> None:
    members = [member(AMBER, roomy(6), Slice(0, 2)), member(BIRCH, roomy(6), Slice(4, 6))]
    found = plan(even(6), members)
    assert found is not None
    assert sum(found[one.node] != one.layers for one in members) == 1


def test_few_nodes_are_tried_in_every_order() -> None:
    shape = ModelShape((1, 1, 1, 1), embed_bytes=4, head_bytes=5, tied=True)
    room = Capacities(4, 2, 1, 1)
    members = [
        member(AMBER, room),
        Member(BIRCH, room, Slice(0, 1), pinned=True),
        member(CEDAR, room, Slice(0, 1)),
    ]
    found = plan(shape, members)
    assert found is not None
    assert covered(4, found.values())
    assert bytes_moved(shape, members, found) == 2


@st.composite
def busy_pools(draw: st.DrawFn, max_nodes: int, max_layers: int) -> tuple[ModelShape, list[Member]]:
    """Nodes that are free, serve what fits, or are pinned."""
    picky = max_nodes > 6 and draw(st.booleans())
    shape, nodes = draw(picky_pools() if picky else mixed_pools(max_nodes, max_layers))
    members = []
    for node, room in nodes.items():
        fitting = [part for part in slices(shape.layers) if room.fits(part, shape.layers)]
        held = draw(st.sampled_from([None, *fitting]))
        pinned = held is not None and draw(st.integers(0, 3)) == 0
        members.append(Member(node, room, held, pinned))
    return shape, members


@given(busy_pools(max_nodes=3, max_layers=5), st.booleans())
@settings(max_examples=80, deadline=None)
def test_few_nodes_move_as_few_bytes_as_possible(
    pool: tuple[ModelShape, list[Member]], whole: bool
) -> None:
    shape, members = pool
    found = plan(shape, members, whole=whole)
    best = fewest_bytes(shape, members, whole=whole)
    assert (None if found is None else bytes_moved(shape, members, found)) == best


@given(busy_pools(max_nodes=9, max_layers=12), st.booleans())
@settings(max_examples=100, deadline=None)
def test_a_plan_covers_fits_and_exists_whenever_the_pool_suffices(
    pool: tuple[ModelShape, list[Member]], whole: bool
) -> None:
    shape, members = pool
    rooms = {one.node: one for one in members}
    found = plan(shape, members, whole=whole)
    if found is not None:
        assert covered(shape.layers, found.values(), whole=whole)
        for node, part in found.items():
            assert rooms[node].capacities.fits(part, shape.layers)
            assert not rooms[node].pinned or rooms[node].layers == part
    if not any(one.pinned for one in members):
        sufficient = coverable(shape.layers, [one.capacities for one in members])
        assert (found is not None) == sufficient


@given(busy_pools(max_nodes=6, max_layers=8), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_every_node_makes_the_same_plan_in_whatever_order_it_heard_of_the_others(
    pool: tuple[ModelShape, list[Member]], random: st.DataObject
) -> None:
    shape, members = pool
    heard = list(members)
    random.shuffle(heard)  # type: ignore[attr-defined]
    assert plan(shape, heard) == plan(shape, members)


def test_a_hundred_nodes_are_planned_within_a_second() -> None:
    members = [member(NodeId(f"n{i:03}"), Capacities(9, 8, 8, 7)) for i in range(100)]
    started = perf_counter()
    found = plan(even(80), members)
    assert perf_counter() - started < 2
    assert found is not None
    assert covered(80, found.values())
