"""How many threads a step should use: found by trying, and again when the machine gets busy. Pure.

An operation of several threads ends when the last of them does. On a machine that others use, too,
one thread less may be several times faster, and which count is best changes with its load.
"""

from __future__ import annotations

from collections import deque
from statistics import median

TRIALS = 3  # steps of each kind of work with each count; the best of them counts
RECENT = 9  # steps
SLOWER = 2.0  # times its usual time: the machine has changed
TRY_AGAIN = 5000  # steps; a machine that calms down is not noticed otherwise

Kind = tuple[int, int]  # of steps: bits of the number of tokens, layers


class ThreadTuner:
    """Tell it how long each step `took`; `count` is what the next step should use.

    Steps are compared only with steps of as many tokens, to the next power of two, and as many
    layers.
    """

    def __init__(self, most: int) -> None:
        if most < 1:
            raise ValueError(f"{most} threads")
        self._most = most
        self._usual: dict[Kind, float] = {}  # seconds, by kind, with the chosen count
        self._recent: deque[float] = deque(maxlen=RECENT)  # times their usual time
        self._steps = 0
        self._trials: dict[int, list[float]] = {}
        self._kind: Kind | None = None  # of the steps that are being compared
        self.count = most
        self._begin()

    def took(self, tokens: int, seconds: float, layers: int = 0) -> int:
        """Returns the count for the next step."""
        kind = tokens.bit_length(), layers
        if self._trials:
            self._try(kind, seconds)
        else:
            self._watch(kind, seconds)
        return self.count

    # ---- trying

    def _begin(self) -> None:
        """Compare one thread, two, four ... and all."""
        counts = sorted({self._most, *(1 << i for i in range(self._most.bit_length()))})
        self._trials = {count: [] for count in counts if count <= self._most}
        self._kind, self._steps = None, 0
        self._recent.clear()
        self.count = self._most
        if len(self._trials) == 1:
            self._trials = {}

    def _try(self, kind: Kind, seconds: float) -> None:
        if self._kind is None:
            self._kind = kind
        if kind != self._kind:
            return  # of another size: not comparable
        self._trials[self.count].append(seconds)
        if len(self._trials[self.count]) < TRIALS:
            return
        left = [count for count, times in self._trials.items() if not times]
        if left:
            self.count = left[-1]
            return
        best = {count: min(times) for count, times in self._trials.items()}
        self.count = min(best, key=lambda count: best[count])
        self._usual = {kind: best[self.count]}
        self._trials = {}

    # ---- watching

    def _watch(self, kind: Kind, seconds: float) -> None:
        usual = self._usual.setdefault(kind, seconds)
        self._recent.append(seconds / usual)
        self._steps += 1
        changed = len(self._recent) == RECENT and median(self._recent) > SLOWER
        if self._most > 1 and (changed or self._steps >= TRY_AGAIN):
            self._usual = {}
            self._begin()
        else:  # drifts with what is usual, so that a longer context is no change of the machine
            self._usual[kind] = usual + 0.02 * (seconds - usual)
