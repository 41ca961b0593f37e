import time
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from shoal.bus import Announcement, MeshView, view
from shoal.bus.announcement import Demand
from shoal.bus.cells import MAX_DEPTH
from shoal.bus.coordinates import Coordinates
from shoal.units import ModelId, NodeId

from .nodes import AMBER, BIRCH, CORAL, STAGE, announcement

MEMBERS = (AMBER, BIRCH, CORAL)
ALL = {(who.node, n): announcement(who, n) for who in MEMBERS for n in range(4)}
hearings = st.lists(st.tuples(st.sampled_from(sorted(ALL)), st.integers(0, 100)), max_size=12)


def of(*said: Announcement, now: float = 0.0) -> MeshView:
    mesh = MeshView()
    for each in said:
        mesh.apply(each, now)
    return mesh


def crowd(count: int) -> MeshView:
    """Many nodes; their ids are names, and their cards are birch's."""
    mesh, said = MeshView(AMBER.node), announcement(BIRCH)
    for number in range(count):
        card = replace(said.card, node=NodeId(f"npub{number}"))
        mesh.apply(replace(said, card=card), float(number))
    return mesh


@given(hearings)
def test_a_view_holds_the_newest_of_each_node_in_any_order(
    heard: list[tuple[tuple[str, int], int]],
) -> None:
    mesh = MeshView()
    for key, now in heard:
        mesh.apply(ALL[key], now)
    newest = {node: max(n for (who, n), _ in heard if who == node) for (node, _), _ in heard}
    assert {said.node: said.sequence for said in mesh.announcements()} == newest
    assert [said.node for said in mesh.announcements()] == sorted(newest)


@given(hearings, st.integers(0, 300))
def test_what_ran_out_is_found_whatever_was_heard_in_which_order(
    heard: list[tuple[tuple[str, int], int]], later: int
) -> None:
    mesh, last = MeshView(), {}
    for key, now in sorted(heard, key=lambda each: each[1]):
        if mesh.apply(ALL[key], now):
            last[key[0]] = now
    expected = sorted(node for node, at in last.items() if at + 120 < later)
    assert mesh.expire(later) == expected
    assert mesh.expire(later) == []
    assert len(mesh) == len(last) - len(expected)


def test_a_list_that_was_handed_out_stays_as_it_is() -> None:
    mesh = of(announcement(AMBER))
    before = mesh.announcements()
    assert before is mesh.announcements()
    mesh.apply(announcement(BIRCH), 0)
    assert (len(before), len(mesh.announcements())) == (1, 2)
    assert mesh.remove(AMBER.node)
    assert not mesh.remove(AMBER.node)
    assert [said.node for said in mesh.announcements()] == [BIRCH.node]
    assert mesh.get(AMBER.node) is None


def test_nodes_live_as_long_as_they_say() -> None:
    mesh = of(announcement(AMBER, lifetime_s=500.0), announcement(BIRCH, lifetime_s=50.0))
    assert mesh.expire(50.0) == []
    assert mesh.expire(51.0) == [BIRCH.node]
    assert mesh.expire(501.0) == [AMBER.node]


def test_hearing_the_same_announcement_again_keeps_a_node_alive() -> None:
    mesh = of(announcement(AMBER))
    mesh.apply(announcement(AMBER), 90.0)
    assert mesh.expire(150.0) == []
    assert mesh.expire(211.0) == [AMBER.node]


def test_an_older_announcement_does_not_keep_a_node_alive() -> None:
    mesh = of(announcement(AMBER, 2))
    assert not mesh.apply(announcement(AMBER, 1), 90.0)
    assert mesh.expire(150.0) == [AMBER.node]


def test_a_mere_refresh_changes_no_version_and_load_no_layout() -> None:
    mesh = of(announcement(AMBER))
    version, layout = mesh.version, mesh.layout
    mesh.apply(announcement(AMBER, 2), 1.0)
    assert (mesh.version, mesh.layout) == (version, layout)
    busy = replace(STAGE, sessions=3)
    for changes in ({"stages": (busy,)}, {"place": Coordinates((0.1, 0.0, 0.0))}):
        mesh.apply(announcement(AMBER, 3, **changes), 2.0)
        assert mesh.version > version
        assert mesh.layout == layout
        version = mesh.version
    mesh.apply(announcement(AMBER, 4, stages=(replace(STAGE, state="draining"),)), 3.0)
    assert mesh.layout > layout
    layout = mesh.layout
    mesh.remove(AMBER.node)
    assert mesh.version > version
    assert mesh.layout > layout


def test_what_is_asked_for_counts_once_it_is_much_more_or_less() -> None:
    mesh, layouts = of(announcement(AMBER)), []
    for sequence, rate in enumerate([1.0, 1.3, 1.9, 2.6, 2.0, 1.5, 1.2, 0.0, 0.0], start=2):
        mesh.apply(announcement(AMBER, sequence, demand=(Demand(STAGE.model, rate),)), 1.0)
        layouts.append(mesh.layout)
    steps = [after - before for before, after in pairwise(layouts)]
    assert steps == [0, 0, 1, 0, 0, 1, 1, 0]


def test_what_many_ask_for_counts_together() -> None:
    mesh = of(announcement(AMBER), announcement(BIRCH))
    layout = mesh.layout
    for sequence, (who, rate) in enumerate([(AMBER, 4.0), (BIRCH, 3.0), (AMBER, 2.0)], start=2):
        mesh.apply(announcement(who, sequence, demand=(Demand(STAGE.model, rate),)), 1.0)
    assert mesh.layout == layout + 1
    mesh.apply(announcement(BIRCH, 9, demand=(Demand(ModelId("other"), 3.0),)), 1.0)
    assert mesh.layout == layout + 2
    mesh.remove(AMBER.node)
    mesh.apply(announcement(BIRCH, 10, demand=(Demand(STAGE.model, 3.0),)), 1.0)
    assert mesh.layout == layout + 4


def test_a_crowd_of_strangers_cannot_fill_our_memory() -> None:
    mesh = crowd(view.MAX_NODES)
    assert not mesh.apply(announcement(AMBER), 0)
    assert len(mesh) == view.MAX_NODES
    assert AMBER.node not in mesh.nodes


def test_an_announcement_takes_as_long_in_a_mesh_of_thousands_as_in_one_of_a_few() -> None:
    def seconds(mesh: MeshView) -> float:
        said, best = [announcement(BIRCH, n) for n in range(50)], 1e9
        for turn in range(5):
            started = time.perf_counter()
            for each in said:
                mesh.apply(replace(each, sequence=each.sequence + 50 * turn), 1e6)
                mesh.expire(0.0)
            best = min(best, time.perf_counter() - started)
        return best

    few, many = crowd(5), crowd(4000)
    assert seconds(many) < 4 * seconds(few) + 1e-3


def test_cells_are_counted_as_nodes_come_and_go() -> None:
    mesh = crowd(600)
    assert mesh.heard_at(0) == 600
    assert [mesh.heard_at(depth) for depth in range(4)] == sorted(
        (mesh.heard_at(depth) for depth in range(4)), reverse=True
    )
    assert abs(mesh.heard_at(1) - 300) < 60
    mesh.expire(1e9)
    assert [mesh.heard_at(depth) for depth in range(MAX_DEPTH + 1)] == [0] * (MAX_DEPTH + 1)


def test_who_comes_and_goes_without_end_leaves_nothing_behind() -> None:
    mesh = of(announcement(BIRCH, lifetime_s=500.0))
    for sequence in range(1000):
        mesh.apply(announcement_of_amber(sequence), 0.0)
        mesh.remove(AMBER.node)
    mesh.apply(announcement_of_amber(1000), 0.0)
    assert len(mesh._ends) < 200
    assert mesh.expire(130.0) == [AMBER.node]
    assert mesh.expire(501.0) == [BIRCH.node]


def announcement_of_amber(sequence: int) -> Announcement:
    return replace(ALL[AMBER.node, 1], sequence=sequence)
