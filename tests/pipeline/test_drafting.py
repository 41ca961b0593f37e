import pytest

from shoal.engine.draft import DraftLength
from shoal.engine.request import Sampled
from shoal.engine.rows import Row
from shoal.pipeline.drafting import Drafting, fits_draft, with_draft
from shoal.units import SessionId

SESSION = SessionId("s")


def row(start: int, *ids: int) -> Row:
    return Row(SESSION, start, (0,), len(ids), ids)


def test_only_the_row_of_the_last_token_takes_a_draft_along() -> None:
    drafting = Drafting([5, 6, 7])
    wish = drafting.wish(row(2, 7), 9)
    assert wish is not None
    assert (wish.session, list(wish.ids), wish.count) == (SESSION, [5, 6, 7], DraftLength.FIRST)
    assert drafting.wish(row(1, 6), 9) is None
    assert drafting.wish(row(1, 6, 7), 9) is None, "a prompt's chunk"
    assert drafting.wish(row(2, 7), 0) is None
    short = drafting.wish(row(2, 7), 1)
    assert short is not None
    assert short.count == 1


def test_wrong_guesses_are_followed_by_rows_without() -> None:
    drafting = Drafting([5])
    drafting.learn([6], drafted=4)
    assert list(drafting.ids) == [5, 6]
    assert drafting.wish(row(1, 6), 9) is None


def test_a_draft_ends_before_a_token_that_does_not_exist() -> None:
    drafted = with_draft(row(3, 7), (8, 9, 100, 5), vocab_size=100)
    assert (drafted.count, drafted.ids, drafted.draft) == (3, (7, 8, 9), (8, 9))
    assert drafted.generates
    assert with_draft(row(3, 7), (100,), vocab_size=100) == row(3, 7)


@pytest.mark.parametrize(
    ("tokens", "fits"),
    [([], True), ([1], True), ([1, 2], True), ([2], False), ([1, 2, 3], False), ([1, 9], False)],
)
def test_an_answer_begins_as_the_draft(tokens: list[int], fits: bool) -> None:
    assert fits_draft([Sampled(token) for token in tokens], (1, 2)) == fits


def test_no_token_of_the_draft_can_be_the_end_and_not_the_last() -> None:
    assert not fits_draft([Sampled(1, "stop")], (1, 2))
