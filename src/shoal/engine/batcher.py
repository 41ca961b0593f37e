"""Chooses the rows of the next step: first what generates, then prompts in turn, as far as those
who generate keep their pace. Pure.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

from ..hardware import Speed
from ..units import SessionId
from .pace import Pace, SpeedMeter
from .rows import Row
from .turns import Turns


def chunk_prompt(
    ids: Sequence[int], chunk_tokens: int = 256, start: int = 0
) -> Iterator[tuple[int, Sequence[int]]]:
    """Cut a prompt from position `start` on into (start, ids) at multiples of `chunk_tokens`.

    The cuts depend on nothing but position, so that a prompt computed again elsewhere gives the
    same bits.
    """
    while start < len(ids):
        stop = min(len(ids), start - start % chunk_tokens + chunk_tokens)
        yield start, ids[start:stop]
        start = stop


@dataclass(kw_only=True, frozen=True, slots=True)
class BatcherConfig:
    max_tokens: int = 512  # prompt tokens of one step, all sessions together
    max_rows: int = 64
    max_drafted: int = 64  # draft tokens of one step
    pace: float = 3.0  # with prompts, a step takes about so many times one without, while any run
    granule: int = 16  # prompt tokens that get into a step however slow they are
    any_cut: bool = False  # a result does not depend on where prompts are cut: the exact class


class Batcher:
    """Rows wait here for their step. A session's rows keep order, and no step has two of them.

    Prompts take turns: first their owners, then an owner's sessions, by the tokens they have had.
    """

    def __init__(
        self, config: BatcherConfig | None = None, meter: SpeedMeter | None = None
    ) -> None:
        """`meter` learns how long steps take; what it expects at first is its maker's matter."""
        self._config = known = config or BatcherConfig()
        self._meter = meter or SpeedMeter(1)
        self._pace = Pace(self._meter, known.pace, known.max_tokens, known.granule)
        self._waiting: dict[SessionId, deque[Row]] = {}
        # sessions by what their oldest row is, in the order of their turn; dicts, because a drop
        # leaves the middle
        self._generating: dict[SessionId, None] = {}
        self._prefilling: dict[SessionId, None] = {}
        self._owners, self._sessions = Turns(), Turns()
        self._running: set[SessionId] = set()  # they generate, here or elsewhere in their ring

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    @property
    def speed(self) -> Speed:
        """As far as what was observed tells."""
        return self._meter.speed

    def add(self, row: Row) -> None:
        rows = self._waiting.setdefault(row.session, deque())
        rows.append(row)
        if len(rows) == 1:
            self._queue_up(row.session)

    def drop(self, session: SessionId) -> None:
        """Forget a session and all its rows."""
        self._waiting.pop(session, None)
        self._generating.pop(session, None)
        self._prefilling.pop(session, None)
        self._running.discard(session)

    def observe(self, rows: Sequence[Row], seconds: float) -> None:
        """A step of these rows took so long."""
        self._pace.observe(rows, seconds)

    def take(self, held: Container[SessionId] = ()) -> list[Row]:
        """The rows of one ragged forward, none of them of `held` sessions; empty when nothing
        waits.
        """
        places = self._config.max_rows
        generating = [session for session in self._generating if session not in held]
        prefilling = [session for session in self._prefilling if session not in held]
        kept = 1 if prefilling and places > 1 else 0  # prompts always get on
        chosen = self._as_drafts_fit(generating[: places - kept])
        self._running.update(chosen)
        rows = [self._pop(session) for session in chosen]
        return rows + self._prefills(prefilling, places - len(rows))

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

    def _prefills(self, prefilling: list[SessionId], places: int) -> list[Row]:
        """As far as the budget goes, in turn. Where prompts may be cut, the last is cut to fit;
        where not, the first goes even if it is larger than the budget.
        """
        rows: list[Row] = []
        left = self._pace.budget() if self._running else self._config.max_tokens
        while prefilling and len(rows) < places:
            session = min(prefilling, key=self._turn)
            size = self._waiting[session][0].count
            if size > left:
                if rows and not (self._config.any_cut and left >= self._config.granule):
                    break
                size = max(left, 1) if self._config.any_cut else size
            prefilling.remove(session)
            row = self._pop(session, size)
            self._owners.charge(row.owner, size)
            self._sessions.charge(session, size)
            rows.append(row)
            left -= size
        return rows

    def _turn(self, session: SessionId) -> tuple[int, int]:
        owner = self._waiting[session][0].owner
        return self._owners.of(owner), self._sessions.of(session)

    def _pop(self, session: SessionId, size: int | None = None) -> Row:
        """The session's oldest row, or its first `size` tokens."""
        rows = self._waiting[session]
        row = rows.popleft()
        if size is not None and row.count > size:
            row, rest = row.cut(size)
            rows.appendleft(rest)
        self._generating.pop(session, None)
        self._prefilling.pop(session, None)
        self._queue_up(session)
        return row

    def _queue_up(self, session: SessionId) -> None:
        rows = self._waiting[session]
        if not rows:
            del self._waiting[session]
        elif rows[0].generates:
            self._generating[session] = None
        else:
            self._prefilling[session] = None
