from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.placement import Capacities, choose_slice, covered
from shoal.units import Slice

from .pools import NOWHERE, roomy, slices

FIVE = Capacities(5, 5, 5, 5)


def test_a_node_with_room_for_all_takes_all() -> None:
    assert choose_slice(8, roomy(8), []) == Slice(0, 8)


def test_the_first_of_many_starts_at_the_embedding() -> None:
    assert choose_slice(8, FIVE, []) == Slice(0, 5)


def test_a_node_whose_embedding_does_not_fit_leaves_it_to_others() -> None:
    chosen = choose_slice(8, Capacities(5, 0, 4, 0), [])
    assert chosen == Slice(4, 8)


def test_a_hole_is_filled_up_to_its_edges_and_no_further() -> None:
    assert choose_slice(8, FIVE, [Slice(0, 3), Slice(6, 8)]) == Slice(3, 6)


def test_a_hole_too_wide_is_filled_from_an_edge() -> None:
    assert choose_slice(12, Capacities(3, 3, 3, 3), [Slice(0, 4)]) == Slice(4, 7)


def test_one_slice_that_spans_two_holes_is_better_than_one_hole() -> None:
    held = [Slice(0, 3), Slice(4, 5), Slice(6, 8)]
    assert choose_slice(8, Capacities(3, 3, 3, 3), held) == Slice(3, 6)


def test_when_all_is_held_the_weakest_slice_gets_a_replica_with_the_same_edges() -> None:
    held = [Slice(0, 4), Slice(4, 8), Slice(0, 4)]
    assert choose_slice(8, FIVE, held) == Slice(4, 8)
    assert choose_slice(8, roomy(8), held) == Slice(4, 8)


def test_when_all_is_equally_weak_a_big_node_replicates_all() -> None:
    assert choose_slice(8, roomy(8), [Slice(0, 4), Slice(4, 8)]) == Slice(0, 8)


def test_slices_that_do_not_meet_are_joined() -> None:
    chosen = choose_slice(8, FIVE, [Slice(0, 5), Slice(3, 8)])
    assert chosen in (Slice(0, 3), Slice(5, 8))


def test_a_slice_beyond_the_model_does_not_confuse_the_choice() -> None:
    assert choose_slice(8, FIVE, [Slice(0, 3), Slice(3, 99)]) == Slice(3, 8)


def test_a_node_without_room_chooses_nothing() -> None:
    assert choose_slice(8, NOWHERE, []) is None


@given(st.integers(1, 8), st.data())
def test_what_is_chosen_fits_and_completes_a_route_where_one_slice_can(
    layers: int, data: st.DataObject
) -> None:
    room = data.draw(st.builds(Capacities, *[st.integers(0, layers)] * 4))
    held = data.draw(st.lists(st.sampled_from(slices(layers)), max_size=5))
    chosen = choose_slice(layers, room, held)
    possible = [part for part in slices(layers) if room.fits(part, layers)]
    assert (chosen is None) == (not possible)
    assert chosen is None or chosen in possible
    if any(covered(layers, [*held, part], whole=True) for part in possible):
        assert chosen is not None
        assert covered(layers, [*held, chosen], whole=True)
