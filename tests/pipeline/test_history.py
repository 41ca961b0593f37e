"""What was sent on is kept within a budget, and where it starts again is decided from the tail."""

import random

from shoal.pipeline.history import History
from shoal.pipeline.recovery import Cache, Restart, restarts
from shoal.units import SessionId

ONE, TWO = SessionId("one"), SessionId("two")
WIDTH = 3


def rows(*tokens: int) -> memoryview:
    return memoryview(b"".join(bytes([token] * WIDTH) for token in tokens))


def test_what_was_kept_comes_back_and_drafts_are_written_over() -> None:
    chance = random.Random(1)
    history, text = History(1 << 20), [0]
    history.keep(ONE, 0, 1, rows(0))
    for token in range(1, 200):
        start = len(text) - chance.randint(0, min(3, len(text) - 1))
        count = chance.randint(1, 5)
        text[start:] = [token] * count
        history.keep(ONE, start, count, rows(*[token] * count))
        low = chance.randrange(len(text))
        high = chance.randint(low + 1, len(text))
        assert history.part(ONE, low, high) == rows(*text[low:high])
        assert history.nbytes == len(text) * WIDTH
    history.truncate(ONE, 2)
    assert history.part(ONE, 0, 2) == rows(*text[:2])
    assert history.part(ONE, 0, 3) is None
    history.forget(ONE)
    assert history.nbytes == len(history) == 0


def test_the_largest_is_given_up_for_good_when_there_is_no_room() -> None:
    history = History(10 * WIDTH)
    history.keep(TWO, 0, 3, rows(1, 2, 3))
    history.keep(ONE, 0, 7, rows(*range(7)))
    history.keep(TWO, 3, 1, rows(4))
    assert history.first(ONE) is None
    history.keep(ONE, 7, 1, rows(7))
    assert history.first(ONE) is None
    assert history.part(TWO, 1, 4) == rows(2, 3, 4)
    assert history.nbytes == 4 * WIDTH


def test_a_gap_makes_what_is_before_it_useless() -> None:
    history = History(1 << 10)
    history.keep(ONE, 0, 2, rows(0, 1))
    history.keep(ONE, 4, 1, rows(4))
    assert history.first(ONE) == 4


def test_another_name_keeps_what_was_kept() -> None:
    history = History(1 << 10)
    history.keep(ONE, 0, 2, rows(0, 1))
    history.rename(ONE, TWO)
    assert history.part(TWO, 0, 2) == rows(0, 1)
    assert history.first(ONE) is None


def test_only_the_stage_before_the_gap_sends_again() -> None:
    caches = [Cache(20), Cache(20, kept_from=0), Cache(), Cache(19)]
    assert restarts(caches) == [
        Restart(20, False),
        Restart(0, False, replayed=20),
        Restart(19, False),
        Restart(0, False),
    ]


def test_who_has_not_kept_enough_computes_again_from_what_the_one_before_it_kept() -> None:
    caches = [Cache(20, kept_from=0), Cache(20, kept_from=16), Cache(), Cache(19)]
    assert restarts(caches) == [
        Restart(0, False, replayed=20),
        Restart(0, True),
        Restart(19, False),
        Restart(0, False),
    ]


def test_rows_that_were_lost_under_way_are_sent_again() -> None:
    assert restarts([Cache(20, kept_from=4), Cache(18, kept_from=4), Cache(18)]) == [
        Restart(18, False, replayed=2),
        Restart(18, False),
        Restart(0, False),
    ]
