from hypothesis import given
from hypothesis import strategies as st

from shoal.bus import MeshView, view
from shoal.identity import Identity

from .nodes import AMBER, BIRCH, announcement

ALL = {(who.node, n): announcement(who, n) for who in (AMBER, BIRCH) for n in range(4)}
hearings = st.lists(st.tuples(st.sampled_from(sorted(ALL)), st.integers(0, 100)), max_size=12)


@given(hearings)
def test_a_view_holds_the_newest_of_each_node_in_any_order(
    heard: list[tuple[tuple[str, int], int]],
) -> None:
    mesh = MeshView()
    for key, now in heard:
        mesh = mesh.applied(ALL[key], now)
    newest = {node: max(n for (who, n), _ in heard if who == node) for (node, _), _ in heard}
    assert {said.node: said.sequence for said in mesh.announcements()} == newest
    assert [said.node for said in mesh.announcements()] == sorted(newest)


def test_views_are_values() -> None:
    before = MeshView()
    after = before.applied(announcement(AMBER), 0)
    assert (len(before), len(after)) == (0, 1)
    assert len(after.without(AMBER.node)) == 0
    assert len(after) == 1
    assert after.without(BIRCH.node).get(AMBER.node) == after.get(AMBER.node)


def test_a_node_not_heard_for_its_lifetime_expires() -> None:
    mesh = MeshView().applied(announcement(AMBER), 0).applied(announcement(BIRCH), 50)
    assert mesh.expired(100, lifetime_s=100) == (mesh, [])
    left, gone = mesh.expired(101, lifetime_s=100)
    assert gone == [AMBER.node]
    assert left.get(AMBER.node) is None
    assert left.get(BIRCH.node) is not None


def test_hearing_the_same_announcement_again_keeps_a_node_alive() -> None:
    said = announcement(AMBER)
    mesh = MeshView().applied(said, 0).applied(said, 90)
    assert mesh.expired(150, lifetime_s=100)[1] == []


def test_an_older_announcement_does_not_keep_a_node_alive() -> None:
    mesh = MeshView().applied(announcement(AMBER, 2), 0).applied(announcement(AMBER, 1), 90)
    assert mesh.expired(150, lifetime_s=100)[1] == [AMBER.node]


def test_a_crowd_of_strangers_cannot_fill_our_memory() -> None:
    known = MeshView({f"npub{n}": (announcement(BIRCH), 0) for n in range(view.MAX_NODES)})
    assert len(known.applied(announcement(AMBER), 0)) == view.MAX_NODES
    assert Identity.from_secret(b"a" * 32).node not in known.nodes
