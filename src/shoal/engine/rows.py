"""What a step computes: rows, each a run of consecutive tokens of one session. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..units import SessionId, Slice

if TYPE_CHECKING:
    from torch import Tensor

    from .sampling import SamplerState


@dataclass(frozen=True, slots=True)
class Row:
    """`count` tokens of `session` from position `start`.

    `layers` are those to run, all of the stage's when None. A row that begins with the model's
    first layer brings `ids`, the others `hidden` (count, E). `pages` are all pages of the session.
    A `sampler` means: choose the token that follows this row's last one. The last tokens of a row
    may be a `draft`, a guess: then the tokens that follow the one before it are chosen, as far as
    it was right and one more.

    `wire` are hidden states as they came, before the engine thread has made a tensor of them. Rows
    of one `owner` share its turn.
    """

    session: SessionId
    start: int
    pages: Sequence[int]
    count: int
    ids: Sequence[int] | None = None
    hidden: Tensor | None = None
    sampler: SamplerState | None = None
    draft: Sequence[int] = ()
    wire: memoryview | None = None
    owner: str = ""
    layers: Slice | None = None

    @property
    def generates(self) -> bool:
        """True for the one token of a session that generates, with or without a draft."""
        return self.count == 1 + len(self.draft)

    @property
    def stop(self) -> int:
        return self.start + self.count

    def cut(self, count: int) -> tuple[Row, Row]:
        """A prompt's first `count` tokens, and the rest, which keeps the sampler."""
        head: dict[str, object] = {"count": count, "sampler": None}
        rest: dict[str, object] = {"start": self.start + count, "count": self.count - count}
        if self.ids is not None:
            head["ids"], rest["ids"] = self.ids[:count], self.ids[count:]
        if self.hidden is not None:
            head["hidden"], rest["hidden"] = self.hidden[:count], self.hidden[count:]
        if self.wire is not None:
            at = len(self.wire) // self.count * count
            head["wire"], rest["wire"] = self.wire[:at], self.wire[at:]
        return replace(self, **head), replace(self, **rest)  # type: ignore[arg-type]
