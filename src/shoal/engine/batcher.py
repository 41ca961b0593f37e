"""Chooses the rows of the next step: first what generates, then prompts in turn. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

from ..units import SessionId
from .rows import Row


def chunk_prompt(
    ids: Sequence[int], chunk_tokens: int = 256
) -> Iterator[tuple[int, Sequence[int]]]:
    """Cut a prompt into (start, ids) at multiples of `chunk_tokens`.

    The cuts depend on nothing but position, so that a prompt computed again elsewhere gives the
    same bits.
    """
    for start in range(0, len(ids), chunk_tokens):
        yield start, ids[start : start + chunk_tokens]


@dataclass(kw_only=True, frozen=True, slots=True)
class BatcherConfig:
    max_tokens: int = 512  # prompt tokens of one step, all sessions together
    max_rows: int = 64
    max_drafted: int = 64  # draft tokens of one step


class Batcher:
    """Rows wait here for their step. A session's rows keep order, and no step has two of them."""

    def __init__(self, config: BatcherConfig | None = None) -> None:
        self._config = config or BatcherConfig()
        self._waiting: dict[SessionId, deque[Row]] = {}
        # sessions by what their oldest row is, in the order of their turn; dicts, because a drop
        # leaves the middle
        self._generating: dict[SessionId, None] = {}
        self._prefilling: dict[SessionId, None] = {}

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, row: Row) -> None:
        rows = self._waiting.setdefault(row.session, deque())
        rows.append(row)
        if len(rows) == 1:
            self._queue_up(row.session)

    def drop(self, session: SessionId) -> None:
        """Forget all rows of a session."""
        self._waiting.pop(session, None)
        self._generating.pop(session, None)
        self._prefilling.pop(session, None)

    def take(self, held: Container[SessionId] = ()) -> list[Row]:
        """The rows of one ragged forward, none of them of `held` sessions; empty when nothing
        waits.
        """
        places = self._config.max_rows
        generating = [session for session in self._generating if session not in held]
        prefilling = [session for session in self._prefilling if session not in held]
        kept = 1 if prefilling and places > 1 else 0  # prompts always get on
        sessions = self._as_drafts_fit(generating[: places - kept])
        sessions += self._prefills(prefilling, places - len(sessions))
        rows = [self._waiting[session].popleft() for session in sessions]
        for session in sessions:
            self._generating.pop(session, None)
            self._prefilling.pop(session, None)
            self._queue_up(session)
        return rows

    def _as_drafts_fit(self, generating: Sequence[SessionId]) -> list[SessionId]:
        """Those whose drafts find room; the first goes anyway."""
        chosen: list[SessionId] = []
        room = self._config.max_drafted
        for session in generating:
            drafted = len(self._waiting[session][0].draft)
            if drafted <= room or not chosen:
                chosen.append(session)
                room -= drafted
        return chosen

    def _prefills(self, prefilling: Sequence[SessionId], places: int) -> list[SessionId]:
        """Whose turn it is, as far as the budget goes; the first goes even if it is larger than
        the budget.
        """
        chosen: list[SessionId] = []
        budget = self._config.max_tokens
        for session in prefilling:
            budget -= self._waiting[session][0].count
            if len(chosen) >= places or (chosen and budget < 0):
                break
            chosen.append(session)
        return chosen

    def _queue_up(self, session: SessionId) -> None:
        rows = self._waiting[session]
        if not rows:
            del self._waiting[session]
        elif rows[0].generates:
            self._generating[session] = None
        else:
            self._prefilling[session] = None
