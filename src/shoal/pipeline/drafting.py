"""What the first stage keeps of a session in order to guess: all its tokens, and how well the
guesses went.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import replace

from ..engine.draft import DraftLength, Wish
from ..engine.request import Sampled
from ..engine.rows import Row


class Drafting:
    """`ids` are the tokens known so far; the last one's row is waiting, computed or under way."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = array("I", ids)
        self._length = DraftLength()

    def wish(self, row: Row, most: int) -> Wish | None:
        """What `row` could take along: None unless it is that of the last token."""
        count = min(most, self._length.allowed())
        last = row.count == 1 and row.stop == len(self.ids)
        return Wish(row.session, self.ids, count) if last and count > 0 else None

    def learn(self, tokens: Sequence[int], drafted: int) -> None:
        """The answer to a row with so many drafted tokens: those that were right, and one more."""
        self.ids.extend(tokens)
        self._length.report(drafted, len(tokens) - 1)


def with_draft(row: Row, draft: Sequence[int], vocab_size: int) -> Row:
    """A first stage's row and its guess, up to the first id that does not exist."""
    known = next((at for at, token in enumerate(draft) if token >= vocab_size), len(draft))
    if not known or row.ids is None:
        return row
    draft = tuple(draft[:known])
    return replace(row, count=1 + known, ids=(*row.ids, *draft), draft=draft)


def fits_draft(chosen: Sequence[Sampled], draft: Sequence[int]) -> bool:
    """Whether an honest last stage could have answered so: the draft's beginning and one more."""
    right = [one.token for one in chosen[:-1]]
    return len(right) <= len(draft) and right == list(draft[: len(right)])
