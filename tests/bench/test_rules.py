"""The rules of others, on pools small enough to know what they should do."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.units import NodeId, Slice

from .scripts import script

rules: Any = script("rules")


def peers(*capacities: int, layer_s: float = 0.01) -> list[Any]:
    return [rules.Peer(NodeId(f"n{i}"), capacity, layer_s) for i, capacity in enumerate(capacities)]


def hosted(*parts: tuple[int, int], **more: Any) -> list[Any]:
    return [
        rules.Hosted(NodeId(f"n{i}"), Slice(*part), 0.01, **more) for i, part in enumerate(parts)
    ]


def near(a: NodeId | None, b: NodeId | None) -> float:
    return 0.001


def far_from(node: str) -> Any:
    return lambda a, b: 1.0 if node in (a, b) else 0.001


def holders(placed: dict[NodeId, Slice], layers: int) -> list[int]:
    return [sum(part.start <= at < part.stop for part in placed.values()) for at in range(layers)]


pools = st.lists(st.integers(0, 12), min_size=1, max_size=9).map(lambda sizes: peers(*sizes))


# ---- Parallax


def test_water_filling_gives_layers_by_speed_up_to_the_capacity() -> None:
    fast, slow, small = (
        rules.Peer(NodeId("fast"), 20, 0.01, tflops=3.0),
        rules.Peer(NodeId("slow"), 20, 0.01, tflops=1.0),
        rules.Peer(NodeId("small"), 2, 0.01, tflops=3.0),
    )
    assert rules.water_fill(12, [fast, slow]) == [9, 3]
    assert rules.water_fill(14, [fast, slow, small]) == [9, 3, 2]


@given(pools, st.integers(1, 20))
@settings(max_examples=100, deadline=None)
def test_the_capacity_rule_gives_whole_chains_within_capacities(pool: list[Any], n: int) -> None:
    if sum(peer.capacity for peer in pool) < n:
        with pytest.raises(rules.NoChain):
            rules.place_by_capacity(n, pool)
        return
    placed = rules.place_by_capacity(n, pool)
    assert min(holders(placed, n)) >= 1
    assert all(len(placed[p.node]) <= p.capacity for p in pool if p.node in placed)
    without = rules.place_by_capacity(n, pool, spare=False)
    assert len(set(holders(without, n))) == 1, "nobody is outside of a chain"


def test_two_short_chains_are_better_than_one_long_one() -> None:
    placed = rules.place_by_capacity(8, peers(4, 4, 4, 4))
    assert Counter(placed.values()) == {Slice(0, 4): 2, Slice(4, 8): 2}


def test_the_node_left_over_goes_where_the_capacity_is_least() -> None:
    placed = rules.place_by_capacity(8, peers(6, 4, 3))
    assert placed == {"n0": Slice(0, 4), "n1": Slice(4, 8), "n2": Slice(4, 7)}


def test_requests_take_disjoint_chains_in_turn_and_pass_over_full_ones() -> None:
    chains = rules.DisjointChains(8, near)
    pool = hosted((0, 4), (0, 4), (4, 8), (4, 8))
    taken = [chains.choose(pool, 1) for _ in range(4)]
    assert taken[0] == taken[2] != taken[1] == taken[3]
    assert not {node for node, _ in taken[0]} & {node for node, _ in taken[1]}
    full = {node for node, _ in taken[0]}
    pool = [replace(one, free_tokens=0) if one.node in full else one for one in pool]
    assert [chains.choose(pool, 1) for _ in range(2)] == [taken[1]] * 2
    with pytest.raises(rules.NoChain, match="full"):
        chains.choose(hosted((0, 8), free_tokens=3), 4)


def test_the_cheapest_chain_counts_links_and_not_layers() -> None:
    """Many short slices over near links lose to two long ones: only nodes and links cost."""
    pool = hosted((0, 6), (6, 8), (0, 2), (2, 4), (4, 8))
    chain = rules.ShortestChain(8, near).choose(pool, 1)
    assert [node for node, _ in chain] == ["n0", "n1"]
    chain = rules.ShortestChain(8, far_from("n1")).choose(pool, 1)
    assert [node for node, _ in chain] == ["n2", "n3", "n4"]


# ---- Petals


def test_a_joiner_takes_the_window_whose_sorted_throughputs_are_smallest() -> None:
    joiner = rules.Peer(NodeId("new"), 2, 0.01)
    assert rules.weakest_window(joiner, [3.0, 1.0, 2.0, 1.0, 1.0]) == Slice(3, 5)
    assert rules.weakest_window(joiner, [0.0, 5.0, 1.0, 1.0]) == Slice(0, 2)


@given(pools, st.integers(1, 20))
@settings(max_examples=50, deadline=None)
def test_moving_never_makes_the_weakest_block_weaker(pool: list[Any], n: int) -> None:
    known = {peer.node: peer for peer in pool}
    arrived: dict[NodeId, Slice] = {}
    for peer in pool:
        if peer.capacity:
            arrived[peer.node] = rules.weakest_window(peer, rules.block_rates(n, arrived, known))
    placed, _ = rules.place_by_weakest(n, pool)
    before = min(rules.block_rates(n, arrived, known), default=0)
    assert min(rules.block_rates(n, placed, known)) >= before


def test_servers_that_complete_each_other_stay() -> None:
    placed, moves = rules.place_by_weakest(6, peers(4, 4))
    assert min(holders(placed, 6)) == 1
    assert moves == 0


def test_the_shortest_path_stays_to_the_end_of_a_span_and_avoids_full_caches() -> None:
    path = rules.ShortestPath(8, near)
    pool = hosted((0, 5), (3, 8), (5, 8))
    hops = path.choose(pool, 1)
    assert hops == ((NodeId("n0"), Slice(0, 5)), (NodeId("n1"), Slice(5, 8)))
    pool[1] = hosted((0, 1), (3, 8), free_tokens=100)[1]
    assert path.choose(pool, 60)[1][0] == "n2"
    with pytest.raises(rules.NoChain):
        path.choose(pool[1:], 1)


# ---- SWARM


def test_stages_are_as_long_as_the_smallest_node_can_hold() -> None:
    pool = [*peers(4, 4, 9), rules.Peer(NodeId("slow"), 9, 0.1)]
    placed = rules.place_evenly(8, pool)
    assert Counter(placed.values()) == {Slice(0, 4): 2, Slice(4, 8): 2}
    with pytest.raises(rules.NoChain):
        rules.place_evenly(8, peers(4, 1))


def test_peers_have_their_turn_by_how_fast_they_respond() -> None:
    router = rules.InTurn(4)
    pool = hosted((0, 4), (0, 4))
    router.responded(NodeId("n0"), 0.1)
    router.responded(NodeId("n1"), 0.3)
    taken = Counter(router.choose(pool, 1)[0][0] for _ in range(400))
    assert taken["n0"] == pytest.approx(300, abs=2)


def test_a_newcomer_does_not_get_everything() -> None:
    router = rules.InTurn(4)
    for _ in range(100):
        router.choose(hosted((0, 4)), 1)
    taken = Counter(router.choose(hosted((0, 4), (0, 4)), 1)[0][0] for _ in range(10))
    assert taken == {"n0": 5, "n1": 5}


@given(pools, st.integers(1, 12))
@settings(max_examples=50, deadline=None)
def test_whoever_finds_a_way_finds_a_whole_one(pool: list[Any], n: int) -> None:
    try:
        placed = rules.place_by_capacity(n, pool)
    except rules.NoChain:
        return
    known = {peer.node: peer for peer in pool}
    serving = [rules.Hosted(node, part, known[node].layer_s) for node, part in placed.items()]
    for router in (rules.DisjointChains(n, near), rules.ShortestPath(n, near)):
        assert rules.meets(n, router.choose(serving, 1))
