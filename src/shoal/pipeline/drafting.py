"""What the first stage keeps of its sessions in order to guess, and which rows may take a guess
along.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..engine.draft import MAX_DRAFT, DraftLength, Wish
from ..engine.request import Sampled
from ..engine.rows import Row
from ..units import SessionId

if TYPE_CHECKING:
    from .session import Session, StageSessionsConfig


class Drafting:
    """One session. `ids` are its tokens so far; the last one's row is waiting, computed or under
    way.
    """

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


@dataclass
class Guesses:
    """Of all sessions of a stage; where there are many, none has a place for any."""

    sessions: Mapping[SessionId, Session]
    config: StageSessionsConfig
    page_size: int
    vocab_size: int

    def wishes(self, rows: Sequence[Row]) -> dict[int, Wish]:
        """What a drafter could add to these rows, by their place."""
        most = min(MAX_DRAFT, self.config.draft_positions // max(1, len(self.sessions)) - 1)
        found: dict[int, Wish] = {}
        for at, row in enumerate(rows):
            this = self.sessions[row.session]
            if this.drafting is not None and this.position == row.stop:
                wish = this.drafting.wish(row, min(most, self._room(this, row)))
                found |= {at: wish} if wish is not None else {}
        return found

    def _room(self, this: Session, row: Row) -> int:
        """Within its pages, and for no more tokens than may be said, with the one that follows."""
        most = min(len(row.pages) * self.page_size, this.open.reserve_tokens - 1)
        return most - row.stop

    def added(self, rows: Sequence[Row], drafts: Mapping[int, Sequence[int]]) -> list[Row]:
        """The rows, with drafts where there are some."""
        drafted = list(rows)
        for at, draft in drafts.items():
            row = drafted[at] = with_draft(rows[at], draft, self.vocab_size)
            this = self.sessions.get(row.session)  # none where it has another name by now
            if this is not None and this.position == rows[at].stop:
                this.position, this.draft = row.stop, row.draft
        return drafted


def with_draft(row: Row, draft: Sequence[int], vocab_size: int) -> Row:
    """A first stage's row and its guess, up to the first id that does not exist."""
    known = next((at for at, token in enumerate(draft) if token >= vocab_size), len(draft))
    if not known or row.ids is None:
        return row
    draft = tuple(draft[:known])
    return replace(row, count=1 + known, ids=(*row.ids, *draft), draft=draft)


def fits_draft(foretold: Sequence[Sampled], draft: Sequence[int]) -> bool:
    """Whether an honest last stage could have found these right: the draft's beginning, and none of
    them the end.
    """
    right = [(each.token, each.finish) for each in foretold]
    return right == [(token, "") for token in draft[: len(foretold)]]
