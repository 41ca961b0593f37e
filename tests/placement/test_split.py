from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import NoCapacity
from shoal.placement import Capacities, split
from shoal.units import Slice


def lengths(parts: list[Slice]) -> list[int]:
    return [len(part) for part in parts]


def test_equal_nodes_get_equal_shares() -> None:
    assert split([10] * 8, 2) == [Slice(0, 4), Slice(4, 8)]
    assert sorted(lengths(split([10] * 8, 3))) == [2, 3, 3]


def test_the_head_counts_as_work_of_the_last_node() -> None:
    assert lengths(split([10] * 8, 3, head_bytes=20)) == [3, 3, 2]
    assert lengths(split([10] * 8, 2, head_bytes=40)) == [6, 2]


def test_a_node_twice_as_fast_gets_twice_the_layers() -> None:
    assert lengths(split([10] * 9, [1.0, 2.0])) == [3, 6]


def test_nobody_gets_more_than_fits() -> None:
    small, big = Capacities(2, 2, 2, 2), Capacities(8, 8, 8, 8)
    assert lengths(split([10] * 8, 2, capacities=[small, big])) == [2, 6]


def test_the_slowest_stage_matters_more_than_even_shares() -> None:
    """Loads of 6, 2 and 9 have the smaller squares; 8, 8 and 1 have no stage that takes 9."""
    assert split([6, 2, 8, 1], 3) == [Slice(0, 2), Slice(2, 3), Slice(3, 4)]


def test_one_node_gets_all() -> None:
    assert split([10] * 8, 1) == [Slice(0, 8)]


@pytest.mark.parametrize("nodes", [9, 0])
def test_a_split_that_is_not_possible_is_refused(nodes: int) -> None:
    with pytest.raises(NoCapacity):
        split([10] * 8, nodes)


def test_a_model_too_big_for_the_nodes_is_refused() -> None:
    with pytest.raises(NoCapacity):
        split([10] * 8, 2, capacities=[Capacities(3, 3, 3, 3)] * 2)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=7),
    st.integers(0, 20),
    st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0]), min_size=1, max_size=4),
)
@settings(max_examples=100)
def test_the_slowest_stage_is_as_quick_as_any_split_can_make_it(
    sizes: list[int], head: int, speeds: list[float]
) -> None:
    layers = len(sizes)
    if len(speeds) > layers:
        speeds = speeds[:layers]

    def slowest(stops: tuple[int, ...]) -> float:
        edges = (0, *stops, layers)
        loads = [sum(sizes[a:b]) for a, b in pairwise(edges)]
        loads[-1] += head
        return max(load / speed for load, speed in zip(loads, speeds, strict=True))

    parts = split(sizes, speeds, head_bytes=head)
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert parts[-1].stop == layers
    best = min(map(slowest, combinations(range(1, layers), len(speeds) - 1)))
    assert slowest(tuple(part.stop for part in parts[:-1])) == best
