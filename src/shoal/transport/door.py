"""How much strangers may take from us, and who has to stay outside. No clock of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

_REMEMBERED = 4096  # culprits; the one blamed longest ago is forgotten first


@dataclass(kw_only=True, frozen=True, slots=True)
class BanConfig:
    free_points: int = 0  # penalty points without consequence
    first_s: float = 1.0  # the first ban; each further point doubles it
    longest_s: float = 300.0
    forget_after_s: float = 600.0  # without a fault


class Bans(Generic[K]):
    """Growing bans: the more penalty points, the longer one stays outside."""

    def __init__(self, config: BanConfig) -> None:
        self._config = config
        self._records: dict[K, tuple[int, float, float]] = {}  # points, banned until, blamed at

    def blame(self, culprit: K, penalty: int, now: float) -> None:
        points, _, blamed_at = self._records.pop(culprit, (0, now, now))
        if now - blamed_at > self._config.forget_after_s:
            points = 0
        points += penalty
        self._records[culprit] = (points, now + self._sentence_s(points), now)
        if len(self._records) > _REMEMBERED:
            del self._records[next(iter(self._records))]

    def banned(self, culprit: K, now: float) -> bool:
        return now < self._records.get(culprit, (0, now, now))[1]

    def _sentence_s(self, points: int) -> float:
        beyond = points - self._config.free_points
        if beyond <= 0:
            return 0.0
        return min(self._config.longest_s, self._config.first_s * 2.0 ** min(beyond - 1, 60))


@dataclass(kw_only=True, frozen=True, slots=True)
class DoorConfig:
    max_strangers: int = 64  # connections that have not proved an identity yet
    max_strangers_per_network: int = 16
    bans: BanConfig = BanConfig(free_points=8, longest_s=30.0)  # others may share the address


class Door:
    """Counts connections that have not proved who they are, by the network they come from."""

    def __init__(self, config: DoorConfig) -> None:
        self._config = config
        self._inside: Counter[str] = Counter()
        self._bans: Bans[str] = Bans(config.bans)

    def enter(self, network: str, now: float) -> bool:
        """May one more stranger from there begin? If True, `leave` must follow."""
        if self._bans.banned(network, now):
            return False
        if self._inside.total() >= self._config.max_strangers:
            return False
        if self._inside[network] >= self._config.max_strangers_per_network:
            return False
        self._inside[network] += 1
        return True

    def leave(self, network: str) -> None:
        """It has proved itself, or has gone."""
        self._inside[network] -= 1
        if not self._inside[network]:
            del self._inside[network]

    def blame(self, network: str, penalty: int, now: float) -> None:
        self._bans.blame(network, penalty, now)


class TokenBucket:
    """Bytes per second, with a burst of `burst_s` seconds' worth."""

    def __init__(self, bytes_per_s: float, burst_s: float, now: float) -> None:
        self._rate, self._most = bytes_per_s, bytes_per_s * burst_s
        self._tokens, self._at = self._most, now

    def take(self, count: float, now: float) -> float:
        """Spend `count` tokens, into debt if need be; how many seconds to wait for what follows."""
        self._tokens = min(self._most, self._tokens + (now - self._at) * self._rate) - count
        self._at = now
        return max(0.0, -self._tokens / self._rate)
