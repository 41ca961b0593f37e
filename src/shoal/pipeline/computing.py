"""What a stage has computed, on the engine thread: guesses, and forwards that are watched, since an
engine may hang.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..engine.batcher import Batcher
from ..engine.pace import Work
from ..engine.request import Sampled
from ..engine.rows import Row
from ..units import SessionId
from .watch import Watch

if TYPE_CHECKING:
    from ..engine.draft import Drafter, Wish
    from ..engine.stage import Stage, StepResult
    from ..engine.thread import EngineThread
    from .drafting import Guesses

HUNG_S, HUNG_TIMES = 5.0, 20.0  # a forward that takes longer, and so many times its usual time


class Computing:
    """`batcher` learns how long steps take."""

    def __init__(
        self,
        stage: Stage,
        layers: int,
        thread: EngineThread,
        batcher: Batcher,
        clock: Callable[[], float],
    ) -> None:
        self._stage, self._layers, self._thread = stage, layers, thread
        self._batcher, self._clock = batcher, clock
        self.drafter: Drafter | None = None
        self._forgotten: list[SessionId] = []  # by us, not yet by the drafter
        self._ended: list[SessionId] = []  # here, not yet in the engine
        self.hung = False  # a forward does not come back

    def forget(self, session: SessionId) -> None:
        """It is over."""
        self._forgotten += [session] if self.drafter is not None else []
        self._ended += [session] if self._stage.keeps_states else []

    def take_ended(self) -> list[SessionId]:
        """Those that the engine is to forget before its next forward. Who ends from now on may be
        among the rows of that.
        """
        ended, self._ended = self._ended, []
        return ended

    # ---- guesses

    async def guess(self, rows: Sequence[Row], guesses: Guesses) -> Sequence[Row]:
        """Add drafts where there is room; a drafter that fails adds none."""
        wishes = guesses.wishes(rows) if self.drafter is not None else {}
        if self.drafter is None or not wishes:
            return rows
        over, self._forgotten = self._forgotten, []
        asked = list(wishes.values())
        try:
            if self.drafter.is_quick(asked):
                drafts = _draft(self.drafter, asked, over)
            else:
                drafts = await self._thread.run(_draft, self.drafter, asked, over)
        except (RuntimeError, ValueError, IndexError):
            return rows
        return guesses.added(rows, dict(zip(wishes, drafts, strict=True)))

    # ---- forwards

    async def compute(
        self, rows: Sequence[Row], ended: Iterable[SessionId], hangs: Callable[[], None]
    ) -> tuple[StepResult, float] | Exception:
        """With the seconds that it took; `hangs` is called when it does not come back. Whatever the
        engine raises is a result here: it says something about these rows.
        """

        def told() -> None:
            self.hung = True
            hangs()

        started, watch = self._clock(), Watch(self._hung_after_s(rows), told)
        try:
            (result,) = await asyncio.gather(
                self._thread.run(_forward, self._stage, rows, ended, watch), return_exceptions=True
            )
        finally:
            watch.cancel()
            self.hung = False
        if not isinstance(result, BaseException):
            took = self._clock() - started
            self._batcher.observe(rows, took)
            return result, took
        if not isinstance(result, Exception):
            raise result
        return result

    def _hung_after_s(self, rows: Sequence[Row]) -> float:
        work = Work.of(rows)
        speed = self._batcher.speed
        usual = speed.seconds(self._layers, work.tokens, work.context, work.sampled)
        return max(HUNG_S, HUNG_TIMES * usual)

    async def to_wire(
        self, result: StepResult, rows: Sequence[Row], chosen: Sequence[int]
    ) -> memoryview:
        """The hidden states of some of the rows, put together by the thread."""
        return await self._thread.run(self._stage.hidden_to_wire, result, rows, chosen)


def checked_drafts(
    rows: Sequence[Row], sampled: Sequence[Sequence[Sampled]]
) -> tuple[int, int] | None:
    """How many tokens were guessed in these rows, and how many of them rightly."""
    checked = [
        (len(row.draft), len(chosen) - 1)
        for row, chosen in zip(rows, sampled, strict=True)
        if row.draft and chosen
    ]
    if not checked:
        return None
    return sum(drafted for drafted, _ in checked), sum(accepted for _, accepted in checked)


def _draft(
    drafter: Drafter, wishes: Sequence[Wish], over: Iterable[SessionId]
) -> list[tuple[int, ...]]:
    """After whatever was drafted for sessions that are over."""
    for session in over:
        drafter.forget(session)
    return drafter.draft(wishes)


def _forward(
    stage: Stage, rows: Sequence[Row], ended: Iterable[SessionId], watch: Watch
) -> StepResult:
    """In the engine thread: what came over the wire becomes tensors there."""
    watch.begun = True
    for session in ended:
        stage.forget(session)
    return stage.step([_with_hidden(stage, row) for row in rows])


def _with_hidden(stage: Stage, row: Row) -> Row:
    if row.wire is None:
        return row
    return replace(row, hidden=stage.hidden_from_wire(row.wire, row.count), wire=None)
