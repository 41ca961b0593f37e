from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.placement import ModelShape, capacities, capacity

from .pools import even, shapes, slices


@pytest.mark.parametrize(
    ("end", "layers"), [("middle", 4), ("embedding", 3), ("head", 3), ("both", 3)]
)
def test_the_ends_of_the_model_take_room_from_its_layers(end: str, layers: int) -> None:
    assert capacity(even(8), 41, 0, end) == layers  # type: ignore[arg-type]


def test_the_kv_room_is_reserved_before_the_weights() -> None:
    assert capacity(even(8), 40, kv_tokens=0, end="middle") == 4
    assert capacity(even(8), 40, kv_tokens=10, end="middle") == 2


def test_a_node_without_room_for_one_layer_holds_none() -> None:
    assert capacity(even(8), 9, 0, "middle") == 0
    assert capacity(even(8), 0, 0, "both") == 0


def test_tied_ends_are_counted_once_on_a_stage_that_has_both() -> None:
    tied = ModelShape((10, 10), embed_bytes=50, head_bytes=51, tied=True)
    assert capacity(tied, 71, 0, "both") == 2
    assert capacity(tied, 70, 0, "both") == 1
    apart = ModelShape((10, 10), embed_bytes=50, head_bytes=51)
    assert capacity(apart, 120, 0, "both") == 1


@given(shapes(), st.integers(0, 120), st.integers(0, 4))
def test_what_is_said_to_fit_does_fit_wherever_it_is_put(
    shape: ModelShape, memory: int, kv_tokens: int
) -> None:
    found = capacities(shape, memory, kv_tokens)
    for part in slices(shape.layers):
        if found.fits(part, shape.layers):
            assert shape.slice_bytes(part) + kv_tokens * len(part) <= memory


@given(st.integers(1, 8), st.integers(0, 120), st.integers(0, 4))
def test_with_equal_layers_all_that_fits_is_said_to_fit(
    layers: int, memory: int, kv_tokens: int
) -> None:
    shape = even(layers)
    found = capacities(shape, memory, kv_tokens)
    for part in slices(layers):
        if shape.slice_bytes(part) + kv_tokens * len(part) <= memory:
            assert found.fits(part, layers)


@given(shapes(), st.data())
def test_bytes_moved_are_those_that_were_not_there(shape: ModelShape, data: st.DataObject) -> None:
    parts = st.sampled_from(slices(shape.layers))
    new, old = data.draw(parts), data.draw(parts | st.none())
    held = set(old or ())
    layers = sum(size for i, size in enumerate(shape.layer_bytes) if i in set(new) - held)
    moved = shape.moved_bytes(new, old)
    assert layers <= moved <= shape.slice_bytes(new)
    assert shape.moved_bytes(new, new) == 0
    if old and not shape.tied:
        embed = shape.embed_bytes if new.start == 0 != old.start else 0
        head = shape.head_bytes if new.stop == shape.layers != old.stop else 0
        assert moved == layers + embed + head


@given(shapes())
def test_a_shape_is_measured_from_a_checkpoints_own_sums(shape: ModelShape) -> None:
    again = ModelShape.measured(shape.layer_bytes, shape.slice_bytes, kv_bytes=1)
    for part in slices(shape.layers):
        assert again.slice_bytes(part) == shape.slice_bytes(part)
