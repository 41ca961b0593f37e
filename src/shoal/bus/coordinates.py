"""Where a node lies in the network: points whose distances are times.

Nobody can measure the way to everybody; from a few measured ones each node finds a point for itself
that fits them (Vivaldi: Dabek, Cox, Kaashoek, Morris, SIGCOMM 2004). What others say of themselves
may be a lie: no single measurement moves us by more than MAX_STEP_S.
"""

from __future__ import annotations

import math
import random

import msgspec

MAX_SECONDS = 10.0  # beyond it nothing is a distance on Earth
MAX_STEP_S = 0.01
MIN_HEIGHT_S = 1e-5
UNMEASURED = 0.7  # from this error on, estimates are worth nothing
MIN_ERROR = 0.05  # nobody is believed to be surer than this

_PACE = 0.25  # of the adaptive step, and of the error's average: c_c and c_e of the paper
_LEAST_S = 2e-4  # shorter ways are all alike: relative errors mean nothing below it


class Coordinates(msgspec.Struct, frozen=True, array_like=True):
    """A point, in seconds one way. `height` is the way into the network and out of it, `error` how
    far off estimates are, relative: 1.0 = nothing measured yet.
    """

    at: tuple[float, float, float] = (0.0, 0.0, 0.0)
    height: float = 0.0
    error: float = 1.0

    def __post_init__(self) -> None:
        for number in (*self.at, self.height, self.error):
            if not (math.isfinite(number) and abs(number) <= MAX_SECONDS):
                raise ValueError(f"{number} is not a distance in the network")
        if self.height < 0 or self.error < 0:
            raise ValueError("heights and errors are not negative")

    @property
    def measured(self) -> bool:
        """False as long as it says little."""
        return self.error < UNMEASURED

    def seconds_to(self, other: Coordinates) -> float:
        """One way, estimated."""
        return math.dist(self.at, other.at) + self.height + other.height

    def moved(self, other: Coordinates, seconds: float, chance: random.Random) -> Coordinates:
        """Where we are after one measurement: `seconds` one way to a node that says it is at
        `other`. `chance` gives the direction away from a node at the very same point.
        """
        theirs = min(1.0, max(MIN_ERROR, other.error))
        weight = self.error / (self.error + theirs)
        estimate = self.seconds_to(other)
        surprise = min(1.0, abs(estimate - seconds) / max(seconds, _LEAST_S))
        pace = _PACE * weight
        error = min(1.0, surprise * pace + self.error * (1 - pace))
        step = max(-MAX_STEP_S, min(MAX_STEP_S, pace * (seconds - estimate)))
        away, height = self._away_from(other, chance)
        return Coordinates(
            at=tuple(_bounded(x + step * part) for x, part in zip(self.at, away, strict=True)),  # type: ignore[arg-type]
            height=min(1.0, max(MIN_HEIGHT_S, self.height + step * height)),
            error=max(MIN_ERROR / 2, error),
        )

    def _away_from(
        self, other: Coordinates, chance: random.Random
    ) -> tuple[tuple[float, float, float], float]:
        """The direction that makes the way longer: in the plane, and in height."""
        x, y, z = (ours - theirs for ours, theirs in zip(self.at, other.at, strict=True))
        flat = math.hypot(x, y, z)
        if flat < 1e-9:
            x, y, z = (chance.gauss(0.0, 1.0) for _ in range(3))
            flat = math.hypot(x, y, z) or 1.0
            return (x / flat, y / flat, z / flat), 0.0
        heights = self.height + other.height
        length = flat + heights
        return (x / length, y / length, z / length), heights / length


def _bounded(x: float) -> float:
    return max(-MAX_SECONDS, min(MAX_SECONDS, x))
