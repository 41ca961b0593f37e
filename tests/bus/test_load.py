from msgspec.structs import replace

from shoal.bus.load import moved_much

from .nodes import STAGE

QUIET = replace(STAGE, sessions=0, queue=0, free_tokens=8192, total_tokens=8192)


def test_what_doubles_or_halves_is_worth_telling() -> None:
    busy = replace(QUIET, sessions=8, queue=4, free_tokens=4000)
    assert not moved_much([busy], [busy])
    for changes in ({"sessions": 1}, {"sessions": 17}, {"queue": 0}, {"queue": 9}):
        assert moved_much([busy], [replace(busy, **changes)])
    for changes in ({"sessions": 9}, {"sessions": 6}, {"queue": 5}, {"free_tokens": 3900}):
        assert not moved_much([busy], [replace(busy, **changes)])


def test_the_first_session_is_worth_telling_and_a_few_tokens_are_not() -> None:
    assert moved_much([QUIET], [replace(QUIET, sessions=1)])
    assert not moved_much([QUIET], [replace(QUIET, free_tokens=8192 - 300)])
    assert moved_much([QUIET], [replace(QUIET, free_tokens=4000)])
    full = replace(QUIET, free_tokens=0)
    assert not moved_much([full], [replace(full, free_tokens=60)])
    assert moved_much([full], [replace(full, free_tokens=500)])


def test_another_number_of_stages_is_worth_telling() -> None:
    assert moved_much([], [QUIET])
