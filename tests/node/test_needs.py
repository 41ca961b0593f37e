"""Whether we hear enough of the mesh."""

from __future__ import annotations

from shoal.node.needs import LOOK_S, Needs


def test_routes_are_looked_for_when_the_view_has_changed_and_not_too_often() -> None:
    now, ready, looked = 0.0, {"a": True, "b": False}, 0

    def is_ready(name: str) -> bool:
        nonlocal looked
        looked += 1
        return ready[name]

    needs = Needs(lambda: ["a", "b"], is_ready, lambda: now)
    assert needs()
    assert (needs(), looked) == (True, 2)
    ready["b"] = True
    now += LOOK_S
    assert needs(), "nothing has changed as far as we know"
    needs.changed()
    assert (needs(), looked) == (False, 4)
    needs.changed()
    assert (needs(), looked) == (False, 4), "we looked a moment ago"


def test_who_wants_nothing_has_enough() -> None:
    assert not Needs(list, lambda name: False, lambda: 0.0)()
