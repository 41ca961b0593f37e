"""Which route has the pages of which prompts."""

from __future__ import annotations

import pytest

from shoal.engine.prefix import PAGE_TOKENS
from shoal.node import affinity
from shoal.node.affinity import MAX_ROUTES, MEMORY_S, Affinity, Known
from shoal.units import ModelId, NodeId, Slice

MODEL = ModelId("0123456789abcdef")
PROMPT = list(range(100))


def route(name: str) -> Known:
    return Known("f32", ((NodeId(name), Slice(0, 8)),))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def memory(clock: Clock | None = None, secret: bytes = b"ours") -> Affinity:
    return Affinity(secret, clock or Clock())


def test_a_route_is_known_by_the_pages_that_two_prompts_share() -> None:
    known = memory()
    known.remember(known.names(MODEL, PROMPT), route("amber"))
    longer = known.names(MODEL, [*PROMPT[:40], *range(500, 600)])
    assert known.find(longer) == {route("amber"): 2 * PAGE_TOKENS}
    assert known.find(known.names(MODEL, [7, *PROMPT])) == {}
    assert known.find(known.names(ModelId("f" * 16), PROMPT)) == {}


def test_the_last_token_is_computed_in_any_case() -> None:
    known = memory()
    assert len(known.names(MODEL, PROMPT[: 2 * PAGE_TOKENS])) == 1
    assert known.names(MODEL, PROMPT[:PAGE_TOKENS]) == []
    assert known.names(MODEL, ()) == []


def test_names_tell_nothing_without_the_key() -> None:
    assert memory().names(MODEL, PROMPT) != memory(secret=b"theirs").names(MODEL, PROMPT)


def test_the_longest_and_the_newest_count() -> None:
    known = memory()
    known.remember(known.names(MODEL, PROMPT[:40]), route("amber"))
    known.remember(known.names(MODEL, PROMPT), route("birch"))
    found = known.find(known.names(MODEL, PROMPT))
    assert found == {route("amber"): 32, route("birch"): 96}
    for n in range(MAX_ROUTES):
        known.remember(known.names(MODEL, PROMPT), route(f"other{n}"))
    assert route("birch") not in known.find(known.names(MODEL, PROMPT))


def test_what_was_long_ago_has_most_likely_been_overwritten() -> None:
    clock = Clock()
    known = memory(clock)
    known.remember(known.names(MODEL, PROMPT), route("amber"))
    clock.now = MEMORY_S + 1
    assert known.find(known.names(MODEL, PROMPT)) == {}


def test_no_more_pages_are_remembered_than_there_is_room_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(affinity, "MAX_PAGES", 64)
    known = memory()
    for start in range(0, 10 * affinity.MAX_PAGES, affinity.MAX_PAGES // 2):
        ids = list(range(start, start + 16 * affinity.MAX_PAGES // 4))
        known.remember(known.names(MODEL, ids), route("amber"))
    assert len(known) <= affinity.MAX_PAGES
    assert known.find(known.names(MODEL, ids))
