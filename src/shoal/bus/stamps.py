"""What time it is in the mesh: our clock, set to the median of all that we hear if it is far off.

A clock that is off by minutes makes a node invisible, and deaf: its notes come from the future or
are too old, and so are all others' to it. The correction dates notes on the bus and nothing else.
Where more than half of the clocks are right the median is right, whatever the others say; where
each is wrong in its own way it is at least the same for all, and who goes by it does not move it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median_low

from ..units import NodeId
from .limits import Bounded

MAX_SKEW_S = 86_400.0
TOLERATED_S = 25.0  # nothing is corrected below it: two such clocks are less than a minute apart
LEAST_AUTHORS = 3  # besides us

_MAX_AUTHORS = 256


@dataclass(frozen=True, slots=True)
class _Heard:
    """How far ahead of our clock an author's last two notes were dated."""

    sequence: int
    ahead_s: float
    before_s: float | None


class Stamps:
    """`clock` gives unix seconds. `told(offset_s)` hears of every new correction."""

    def __init__(self, clock: Callable[[], float], told: Callable[[float], None]) -> None:
        self.offset_s = 0.0  # we are so far behind
        self.era = 0  # corrections so far: stamps may have gone back
        self._clock, self._told = clock, told
        self._last = 0
        self._heard: Bounded[NodeId, _Heard] = Bounded(_MAX_AUTHORS)

    def now(self) -> float:
        return self._clock() + self.offset_s

    def next(self) -> int:
        """A whole second that no note of ours of this era bears: of two events of one second relays
        keep the one with the lower id.
        """
        self._last = max(int(self.now()), self._last + 1)
        return self._last

    def heard(self, author: NodeId, sequence: int, created_at: float) -> None:
        """The author's announcement of that number is dated so: anybody may repeat an older one, as
        late as they like.
        """
        before = self._heard.get(author)
        if before is not None and sequence <= before.sequence:
            return
        ahead_s = created_at - self._clock()
        self._heard[author] = _Heard(sequence, ahead_s, before.ahead_s if before else None)
        if self.offset_s or abs(ahead_s) > TOLERATED_S:
            self._judge()

    def _judge(self) -> None:
        """Correct if the median of all clocks, ours among them, is another time."""
        offset_s = median_low([self.offset_s, *map(self._ahead, self._heard.values())])
        if abs(offset_s) <= TOLERATED_S:
            offset_s = 0.0
        small = abs(offset_s - self.offset_s) <= TOLERATED_S
        if small or len(self._heard) < LEAST_AUTHORS or abs(offset_s) > MAX_SKEW_S:
            return
        self.offset_s = offset_s
        self.era, self._last = self.era + 1, 0
        self._told(offset_s)

    def _ahead(self, heard: _Heard) -> float:
        """A note may have been under way, or kept, for long: that one is old means something only
        if the author's next one is as well.
        """
        if heard.before_s is not None:
            return max(heard.before_s, heard.ahead_s)
        old = heard.ahead_s < self.offset_s - TOLERATED_S
        return self.offset_s if old else heard.ahead_s
