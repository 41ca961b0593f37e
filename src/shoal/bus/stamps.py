"""What time it is in the mesh: our clock, corrected when most others say that it is wrong.

A clock that is off by minutes makes a node invisible, and deaf: its notes come from the future or
are too old, and so are all others' to it. The correction dates notes on the bus and nothing else;
whoever fakes it, with most of the authors that we hear, could silence us no worse in other ways.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median_low

from ..units import NodeId
from .limits import Bounded

MAX_SKEW_S = 86_400.0
TOLERATED_S = 30.0  # below it nothing is corrected
LEAST_AUTHORS = 3

_MAX_AUTHORS = 256


class Stamps:
    """`clock` gives unix seconds. `told(offset_s)` hears of every new correction."""

    def __init__(self, clock: Callable[[], float], told: Callable[[float], None]) -> None:
        self.offset_s = 0.0  # we are so far behind
        self.era = 0  # corrections so far: stamps may have gone back
        self._clock, self._told = clock, told
        self._last = 0
        self._heard: Bounded[NodeId, tuple[float | None, float]] = Bounded(_MAX_AUTHORS)

    def now(self) -> float:
        return self._clock() + self.offset_s

    def next(self) -> int:
        """A whole second that no note of ours of this era bears: of two events of one second relays
        keep the one with the lower id.
        """
        self._last = max(int(self.now()), self._last + 1)
        return self._last

    def heard(self, author: NodeId, created_at: float) -> None:
        """A genuine note says this time. It may have been under way, or kept, for long: that it is
        old means something only if an author's next one is as well.
        """
        ahead_s = created_at - self._clock()
        before = self._heard.get(author)
        self._heard[author] = before[1] if before else None, ahead_s
        if self.offset_s or abs(ahead_s) > TOLERATED_S:
            self._judge()

    def _judge(self) -> None:
        """Correct by what more than half of the authors agree on."""
        offsets = sorted(
            ahead_s if before is None else max(before, ahead_s)
            for before, ahead_s in self._heard.values()
            if before is not None or ahead_s > -TOLERATED_S
        )
        if len(offsets) < LEAST_AUTHORS:
            return
        offset_s = median_low(offsets)
        agreeing = sum(abs(each - offset_s) <= TOLERATED_S for each in offsets)
        if abs(offset_s) <= TOLERATED_S:
            offset_s = 0.0
        small = abs(offset_s - self.offset_s) <= TOLERATED_S
        if small or 2 * agreeing <= len(offsets) or abs(offset_s) > MAX_SKEW_S:
            return
        self.offset_s = offset_s
        self.era, self._last = self.era + 1, 0
        self._told(offset_s)
