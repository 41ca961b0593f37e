"""What time it is, when clocks disagree."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.bus.stamps import LEAST_AUTHORS, MAX_SKEW_S, TOLERATED_S, Stamps
from shoal.units import NodeId

NOW = 1_800_000_000.0


def authors(count: int) -> list[NodeId]:
    return [NodeId(f"author{n}") for n in range(count)]


class Clock:
    """A clock that is wrong by `skew_s`."""

    def __init__(self, skew_s: float) -> None:
        self.skew_s, self.true, self.said = skew_s, NOW, 0
        self.told: list[float] = []
        self.stamps = Stamps(lambda: self.true + self.skew_s, self.told.append)

    def hear(self, count: int, turns: int = 3, late_s: float = 0.0) -> None:
        for _ in range(turns):
            for author in authors(count):
                self.note(author, -late_s)
            self.true += 40.0

    def note(self, author: NodeId, ahead_s: float = 0.0) -> None:
        """The next one of that author, dated so far ahead of the true time."""
        self.said += 1
        self.stamps.heard(author, self.said, int(self.true + ahead_s))


@pytest.mark.parametrize("skew_s", [-7200.0, -100.0, 60.0, 3600.0, 80_000.0])
def test_a_clock_that_is_wrong_is_corrected_by_what_the_others_say(skew_s: float) -> None:
    clock = Clock(skew_s)
    clock.hear(5)
    assert abs(clock.stamps.now() - clock.true) <= TOLERATED_S
    assert len(clock.told) == 1
    assert clock.told[0] == pytest.approx(-skew_s, abs=2)


def test_a_clock_that_is_right_is_left_alone_though_notes_were_kept_for_long() -> None:
    clock = Clock(0.0)
    for number, author in enumerate(authors(20)):
        clock.note(author, -7.0 * number)
    clock.hear(20)
    assert (clock.told, clock.stamps.offset_s, clock.stamps.era) == ([], 0.0, 0)


def test_one_clock_against_one_says_nothing_about_which_is_wrong() -> None:
    clock = Clock(3600.0)
    clock.hear(LEAST_AUTHORS - 1)
    assert clock.told == []


def test_who_lies_about_the_time_needs_most_of_the_authors() -> None:
    clock = Clock(0.0)
    for turn in range(5):
        for number, author in enumerate(authors(9)):
            clock.note(author, 5000 if number % 2 else 0)
        clock.true += 40.0 * turn
    assert clock.told == []
    clock = Clock(0.0)
    for author in authors(9):
        clock.note(author, 2 * MAX_SKEW_S)
    assert clock.stamps.offset_s == 0.0  # nobody is a day off


@pytest.mark.parametrize("skew_s", [-3600.0, 3600.0])
def test_a_clock_that_was_set_right_is_believed_again(skew_s: float) -> None:
    clock = Clock(skew_s)
    clock.hear(5)
    clock.skew_s = 0.0
    clock.hear(5)
    assert clock.told[-1] == 0.0
    assert abs(clock.stamps.now() - clock.true) <= 1


def test_stamps_grow_and_begin_anew_after_a_correction() -> None:
    clock = Clock(3600.0)
    before = [clock.stamps.next() for _ in range(3)]
    assert before == sorted(set(before))
    clock.hear(5)
    assert clock.stamps.era == 1
    assert clock.stamps.next() < before[0]


@given(st.integers(0, 1000))
def test_delays_are_not_taken_for_a_wrong_clock(seed: int) -> None:
    clock, chance = Clock(0.0), random.Random(seed)
    for _ in range(6):
        for author in authors(7):
            clock.note(author, -chance.expovariate(1 / 5))
        clock.true += 40.0
    assert clock.told == []


@given(st.lists(st.integers(-300, 300), min_size=LEAST_AUTHORS + 1, max_size=12))
def test_clocks_that_are_wrong_each_in_its_own_way_agree_on_one_time(skews_s: list[int]) -> None:
    clocks = dict(zip(authors(len(skews_s)), map(Clock, map(float, skews_s)), strict=True))
    corrections = []
    for _ in range(8):
        said = {author: int(clock.stamps.now()) for author, clock in clocks.items()}
        for clock in clocks.values():
            for author in said:
                if clocks[author] is not clock:
                    clock.note(author, said[author] - clock.true)
            clock.true += 40.0
        corrections.append(sum(len(clock.told) for clock in clocks.values()))
    times = [clock.stamps.now() for clock in clocks.values()]
    assert max(times) - min(times) <= 2 * TOLERATED_S + 1  # so no note is from the future
    assert corrections[-3] == corrections[-1]


def test_who_repeats_old_notes_does_not_set_our_clock_back() -> None:
    clock = Clock(0.0)
    clock.hear(5)
    for late_s in range(0, 4000, 40):
        for number, author in enumerate(authors(5)):
            clock.stamps.heard(author, 1 + number, clock.true - late_s)
    assert clock.told == []


def test_one_old_note_of_each_is_no_reason_to_change_anything() -> None:
    """Of the others a newcomer hears at first what relays have kept."""
    clock = Clock(0.0)
    clock.note(authors(9)[0], 200)
    for author in authors(9)[1:]:
        clock.note(author, -100)
    assert clock.told == []
