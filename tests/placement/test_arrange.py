from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.placement import Capacities, coverable, covered
from shoal.placement.arrange import Item, Laid, arrange, throughput
from shoal.units import NodeId, Slice

from .pools import slices


def item(name: str, most: int, work: float) -> Item:
    """Does so much work, however it is spread over its layers."""
    room = Capacities(most, most, most, most)
    return Item(NodeId(name), room, tuple(work / n for n in range(1, most + 1)))


def highest_rate(layers: int, laid: list[Laid]) -> float:
    """The largest rate at which no set of layers asks too much of those who hold any of it."""
    best = float("inf")
    for chosen in range(1, 1 << layers):
        of = {layer for layer in range(layers) if chosen >> layer & 1}
        work = sum(one.work for one in laid if of & set(one.layers))
        best = min(best, work / len(of))
    return best


@given(
    st.integers(1, 7),
    st.data(),
)
@settings(max_examples=80, deadline=None)
def test_throughput_is_that_of_the_worst_set_of_layers(layers: int, data: st.DataObject) -> None:
    part, rate = st.sampled_from(slices(layers)), st.integers(1, 9)
    laid = [Laid(*pair) for pair in data.draw(st.lists(st.tuples(part, rate), max_size=6))]
    assert throughput(layers, laid) == pytest.approx(highest_rate(layers, laid))


def test_nodes_of_two_speeds_come_close_to_what_their_work_allows() -> None:
    items = [item(f"a{i}", 18, 38.0) for i in range(4)]
    items += [item(f"b{i:02}", 11, 9.0) for i in range(8)]
    items += [item(f"c{i:02}", 7, 7.5) for i in range(12)]
    laid = list(arrange(60, items).values())
    assert throughput(60, laid) >= 0.95 * (4 * 38 + 8 * 9 + 12 * 7.5) / 60


def test_a_node_whose_memory_is_better_used_for_sessions_holds_less_than_fits() -> None:
    crowded = Item(
        NodeId("amber"), Capacities(8, 8, 8, 8), (9.0, 9.0, 8.0, 6.0, 1.0, 1.0, 1.0, 1.0)
    )
    held = [Laid(Slice(0, 8), 3.0)]
    assert len(arrange(8, [crowded], held)[NodeId("amber")].layers) == 4


def test_what_is_laid_meets_the_edges_of_others() -> None:
    held = [Laid(Slice(0, 4), 5.0), Laid(Slice(4, 8), 5.0)]
    chosen = arrange(8, [item("amber", 4, 4.0)], held)[NodeId("amber")].layers
    assert chosen in (Slice(0, 4), Slice(4, 8))


def test_nodes_stay_on_their_ground() -> None:
    laid = arrange(20, [item(f"n{i}", 4, 4.0) for i in range(3)], ground=Slice(6, 15))
    assert all(6 <= one.layers.start < one.layers.stop <= 15 for one in laid.values())
    assert covered(9, [Slice(o.layers.start - 6, o.layers.stop - 6) for o in laid.values()])


@given(st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_roomy_pools_are_covered_at_the_first_go(seed: int) -> None:
    chance = random.Random(seed)
    layers = chance.randint(4, 40)
    items = [item(f"n{i}", chance.randint(1, layers), chance.random() + 0.1) for i in range(12)]
    if (
        coverable(layers // 2, [one.capacities for one in items])
        and sum(one.most for one in items) > 2 * layers
    ):
        assert covered(layers, [one.layers for one in arrange(layers, items).values()])
