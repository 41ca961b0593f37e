"""How much of the mesh a node listens to."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.bus.cells import (
    MAX_DEPTH,
    CellsConfig,
    Listening,
    cell_of,
    common_depth,
    tag,
    tags,
)
from shoal.units import NodeId

CONFIG = CellsConfig()


def members(count: int, seed: int = 0) -> list[NodeId]:
    return [NodeId(f"npub{seed}x{number}") for number in range(count)]


def heard_by(me: NodeId, nodes: list[NodeId]) -> list[int]:
    """How many others are in our cell of each depth."""
    shared = [common_depth(cell_of(me), cell_of(node)) for node in nodes if node != me]
    return [sum(depth <= each for each in shared) for depth in range(MAX_DEPTH + 1)]


def settled(
    heard: list[int],
    start: Listening | None = None,
    *,
    wanting: Callable[[int], bool] = lambda depth: False,
    seconds: float = 3600.0,
    began: float = 0.0,
) -> tuple[Listening, list[int]]:
    """Where listening ends, and each depth on the way; looked at every second."""
    now, here = began, start or Listening()
    way = [here.depth]
    while now < began + seconds:
        here = here.after(heard, wanting=wanting(here.depth), now=now, config=CONFIG)
        if here.depth != way[-1]:
            way.append(here.depth)
        now += 1.0
    return here, way


def test_a_node_is_tagged_for_one_cell_of_each_depth() -> None:
    node = members(1)[0]
    said = tags("shoal/club", node)
    assert said[0] == "shoal/club"
    assert [tag("shoal/club", cell_of(node), depth) for depth in range(MAX_DEPTH + 1)] == [*said]
    for short, long in itertools.pairwise(said):
        assert long.startswith(short)
    assert len(said[-1]) == len("shoal/club/") + MAX_DEPTH


@given(st.integers(0, 255), st.integers(0, 255))
def test_two_nodes_share_the_cells_down_to_where_their_bits_part(a: int, b: int) -> None:
    depth = common_depth(a, b)
    assert tag("t", a, depth) == tag("t", b, depth)
    if depth < MAX_DEPTH:
        assert tag("t", a, depth + 1) != tag("t", b, depth + 1)


@pytest.mark.parametrize("count", [3, 90, 380, 1000, 4000, 10_000])
def test_a_node_hears_hundreds_whatever_the_size_of_the_mesh(count: int) -> None:
    nodes = members(count)
    for me in nodes[:12]:
        heard = heard_by(me, nodes)
        here, way = settled(heard)
        assert heard[here.depth] <= CONFIG.most
        assert heard[here.depth] >= CONFIG.fewest or here.depth == 0
        assert way == sorted(way)  # straight there


@settings(max_examples=60)
@given(st.lists(st.integers(0, 12_000), min_size=1, max_size=8), st.integers(0, 99))
def test_a_mesh_that_grows_and_shrinks_never_makes_a_node_waver(
    sizes: list[int], seed: int
) -> None:
    nodes, here, now = members(12_000, seed), Listening(), 0.0
    me = NodeId("npub-me")
    for size in sizes:
        here, way = settled(heard_by(me, nodes[:size]), here, seconds=120.0, began=now)
        now += 120.0
        assert way in (sorted(way), sorted(way, reverse=True))


def test_a_cell_that_lacks_what_we_need_is_left_for_a_wider_one_and_kept_so_for_a_while() -> None:
    heard = heard_by(NodeId("npub-me"), members(3000))
    natural, _ = settled(heard)
    here, way = settled(heard, natural, wanting=lambda depth: depth >= natural.depth, seconds=60.0)
    assert way == [natural.depth, natural.depth - 1]
    later, way = settled(heard, here, seconds=2 * CONFIG.hold_s, began=60.0)
    assert way == [natural.depth - 1, natural.depth]
    assert later.depth == natural.depth


def test_what_nobody_has_is_not_looked_for_all_the_time() -> None:
    heard = heard_by(NodeId("npub-me"), members(10_000))
    natural, _ = settled(heard, seconds=10.0)
    here, wide_s, most = natural, 0.0, 0
    for now in range(10, 10 + 8 * 3600):
        here = here.after(heard, wanting=True, now=float(now), config=CONFIG)
        wide_s += here.depth < natural.depth
        most = max(most, heard[here.depth])
    assert wide_s / (8 * 3600) < 0.01
    assert most <= 2 * CONFIG.widest
    assert here.depth in (natural.depth, natural.depth - 1)


def test_needs_do_not_keep_a_newcomer_from_finding_its_cell() -> None:
    heard = heard_by(NodeId("npub-me"), members(10_000))
    here, _ = settled(heard, wanting=lambda depth: True, seconds=5.0)
    assert heard[here.depth] <= CONFIG.most


def test_a_cell_that_empties_is_left_for_its_parent() -> None:
    chance, nodes = random.Random(1), members(3000)
    me = nodes[0]
    here, _ = settled(heard_by(me, nodes))
    left = [me, *chance.sample(nodes[1:], 300)]
    here, _ = settled(heard_by(me, left), here, began=4000.0)
    assert here.depth <= 1
    assert heard_by(me, left)[here.depth] >= CONFIG.fewest or here.depth == 0
