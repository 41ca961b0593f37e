"""What a step computes: rows, each a run of consecutive tokens of one session. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..units import SessionId

if TYPE_CHECKING:
    from torch import Tensor

    from .sampling import SamplerState


@dataclass(frozen=True, slots=True)
class Row:
    """`count` tokens of `session` from position `start`.

    A first stage gets `ids`, the others `hidden` (count, E). `pages` are all pages of the session.
    A `sampler` means: choose the token that follows this row's last one.
    """

    session: SessionId
    start: int
    pages: Sequence[int]
    count: int
    ids: Sequence[int] | None = None
    hidden: Tensor | None = None
    sampler: SamplerState | None = None

    @property
    def stop(self) -> int:
        return self.start + self.count
