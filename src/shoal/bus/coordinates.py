"""Where a node lies in the network: points whose distances are times.

Nobody can measure the way to everybody; from a few measured ones each node finds a point for itself
that fits them (Vivaldi: Dabek, Cox, Kaashoek, Morris, SIGCOMM 2004).
"""

from __future__ import annotations

import math

import msgspec

MAX_SECONDS = 10.0  # beyond it nothing is a distance on Earth


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

    def seconds_to(self, other: Coordinates) -> float:
        """One way, estimated."""
        return math.dist(self.at, other.at) + self.height + other.height
