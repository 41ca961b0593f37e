import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engine.draft import MAX_DRAFT, DraftLength, NgramDrafter, NgramIndex, Wish, rewinds
from shoal.units import SessionId

ids_of_few = st.lists(st.integers(0, 3), max_size=60)


def index_of(ids: list[int]) -> NgramIndex:
    index = NgramIndex()
    index.extend(ids)
    return index


def test_what_followed_the_last_time_is_drafted() -> None:
    assert index_of([1, 2, 3, 4, 5, 9, 1, 2]).draft(3) == (3, 4, 5)


def test_a_longer_match_is_preferred_to_a_later_one() -> None:
    assert index_of([7, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2]).draft(1) == (3,)
    assert index_of([7, 1, 2, 3, 8, 1, 2, 4, 9, 1, 2]).draft(1) == (4,)


def test_a_copy_that_reaches_the_end_goes_on_with_itself() -> None:
    assert index_of([1, 2, 3, 1, 2, 3, 1, 2]).draft(7) == (3, 1, 2, 3, 1, 2, 3)


@pytest.mark.parametrize("ids", [[], [1], [1, 2], [1, 2, 3, 4], [5, 2, 3, 9, 3]])
def test_nothing_is_drafted_where_no_pair_has_come_back(ids: list[int]) -> None:
    assert index_of(ids).draft(4) == ()


@settings(max_examples=60, deadline=None)
@given(ids_of_few, st.integers(1, MAX_DRAFT))
def test_a_draft_is_what_followed_the_longest_match(ids: list[int], count: int) -> None:
    """Against a search by hand, for a text in which fewer places match than are followed."""
    index, end = index_of(ids), len(ids)
    matches = [
        (max(n for n in range(9) if n <= at and ids[at - n : at] == ids[end - n :]), at)
        for at in range(2, end)
        if ids[at - 2 : at] == ids[-2:]
    ]
    if len(matches) <= NgramIndex.CANDIDATES:
        expected: list[int] = []
        if matches:
            text, place = list(ids), max(matches)[1]
            for at in range(count):
                text.append(text[place + at])
            expected = text[end:]
        assert list(index.draft(count)) == expected


@settings(max_examples=30, deadline=None)
@given(ids_of_few, st.integers(1, 7))
def test_an_index_that_grows_is_the_one_made_at_once(ids: list[int], piece: int) -> None:
    growing = NgramIndex()
    for at in range(0, len(ids), piece):
        growing.extend(ids[at : at + piece])
    assert growing.draft(5) == index_of(ids).draft(5)
    assert growing.length == len(ids)


def test_the_index_forgets_what_is_long_past(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NgramIndex, "WINDOW", 50)
    chance, index = random.Random(1), NgramIndex()
    for _ in range(1000):
        index.extend([chance.randrange(10**6)])
        assert len(index._ids) < 100
        assert len(index._latest) < 100
    index.extend([1, 2, 3, 1, 2])
    assert index.draft(1) == (3,)
    assert index.length == 1005


def test_a_drafter_takes_in_only_what_is_new_and_forgets_sessions() -> None:
    drafter, one, other = NgramDrafter(), SessionId("one"), SessionId("other")
    ids = [1, 2, 3, 1, 2]
    assert drafter.draft([Wish(one, ids, 2), Wish(other, [5, 6], 2)]) == [(3, 1), ()]
    ids += [3, 1]
    assert drafter.draft([Wish(one, ids, 1)]) == [(2,)]
    assert drafter.is_quick([Wish(one, [0] * 500, 1)])
    assert not drafter.is_quick([Wish(one, [0] * 500, 1), Wish(other, [0] * 500, 1)])
    drafter.forget(one)
    drafter.forget(one)
    assert drafter.draft([Wish(one, [4, 4], 1)]) == [()]


# ---- how long


def test_right_drafts_grow_to_the_most_and_wrong_ones_stop_them() -> None:
    length = DraftLength(most=8)
    for _ in range(4):
        length.report(length.allowed(), length.allowed())
    assert length.allowed() == 8
    length.report(8, 3)
    assert length.allowed() == 4
    length.report(4, 0)
    assert length.allowed() == 0


def test_drafts_that_keep_failing_cost_ever_less() -> None:
    length, drafted = DraftLength(), 0
    for _ in range(2000):
        count = length.allowed()
        drafted += count
        length.report(count, 0)
    assert drafted < 0.03 * 2000


def test_after_a_rest_a_text_that_repeats_is_noticed() -> None:
    length = DraftLength()
    for _ in range(2000):
        length.report(length.allowed(), 0)
    passes = 0
    while length.allowed() < MAX_DRAFT:
        length.report(length.allowed(), length.allowed())
        passes += 1
    assert passes <= DraftLength.LONGEST_REST + 5


def test_a_text_without_matches_is_left_no_worse() -> None:
    """Nothing to look up is no failure: the first match is tried at once."""
    length = DraftLength()
    for _ in range(100):
        length.report(0, 0)
    assert length.allowed() == DraftLength.FIRST


def test_drafting_works_without_torch() -> None:
    code = "import sys, shoal.engine.draft; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("config", "can"),
    [
        ({"model_type": "llama"}, True),
        ({"layer_types": ["sliding_attention", "full_attention"]}, True),
        ({"layer_types": ["linear_attention", "full_attention"]}, False),
        ({"model_type": "qwen3_next", "linear_num_key_heads": 2}, False),
        ({"model_type": "bamba", "mamba_d_state": 16}, False),
    ],
)
def test_models_with_a_running_state_get_no_drafts(config: dict[str, object], can: bool) -> None:
    assert rewinds(config) == can
