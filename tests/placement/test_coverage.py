from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.placement import (
    Capacities,
    ModelShape,
    coverable,
    coverage,
    covered,
    missing,
    weakest,
)
from shoal.units import NodeId, Slice

from .pools import can_cover, mixed_pools, slices


def test_holders_are_counted_layer_by_layer() -> None:
    held = [Slice(0, 2), Slice(1, 3), Slice(5, 6)]
    assert coverage(6, held) == [1, 2, 1, 0, 0, 1]
    assert missing(6, held) == [Slice(3, 5)]
    assert weakest(6, held) == [Slice(3, 5)]
    assert weakest(2, held) == [Slice(0, 1)]


def test_an_empty_mesh_misses_everything() -> None:
    assert missing(4, []) == [Slice(0, 4)]
    assert not covered(4, [])


def test_slices_that_overlap_make_a_route_unless_they_can_only_be_run_whole() -> None:
    assert covered(8, [Slice(0, 5), Slice(3, 8)])
    assert not covered(8, [Slice(0, 5), Slice(3, 8)], whole=True)
    assert covered(8, [Slice(0, 5), Slice(3, 8), Slice(5, 8)], whole=True)
    assert not covered(8, [Slice(0, 5), Slice(6, 8)])


def test_a_slice_beyond_the_model_covers_no_whole_one() -> None:
    assert not covered(4, [Slice(0, 9)], whole=True)
    assert coverage(4, [Slice(3, 9)]) == [0, 0, 0, 1]


def test_one_layer_cannot_be_shared_by_two_nodes() -> None:
    assert not coverable(1, [Capacities(0, 1, 0, 0), Capacities(0, 0, 1, 0)])
    assert coverable(1, [Capacities(0, 0, 0, 1)])


@given(st.integers(1, 7), st.data())
def test_covered_means_that_slices_can_be_walked_from_end_to_end(
    layers: int, data: st.DataObject
) -> None:
    held = data.draw(st.lists(st.sampled_from(slices(layers)), max_size=8))

    def walk(start: int) -> bool:
        return start == layers or any(walk(part.stop) for part in held if part.start == start)

    assert covered(layers, held, whole=True) == walk(0)
    if covered(layers, held, whole=True):
        assert covered(layers, held)


@given(mixed_pools(max_nodes=4, max_layers=6))
@settings(max_examples=150)
def test_coverable_says_what_trying_every_layout_says(
    pool: tuple[ModelShape, dict[NodeId, Capacities]],
) -> None:
    shape, nodes = pool
    sizes = list(nodes.values())
    assert coverable(shape.layers, sizes) == can_cover(shape.layers, sizes)


@given(
    st.integers(1, 6),
    st.lists(st.builds(Capacities, *[st.integers(0, 6)] * 4), max_size=4),
)
@settings(max_examples=150)
def test_coverable_is_exact_for_capacities_of_any_kind(layers: int, pool: list[Capacities]) -> None:
    assert coverable(layers, pool) == can_cover(layers, pool)
