"""How much of anybody's talk we take: token buckets and memories of fixed size. Time is given."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Bounded(OrderedDict[K, V]):
    """A dict of at most `limit` entries: what was set longest ago makes room."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit

    def __setitem__(self, key: K, value: V) -> None:
        super().__setitem__(key, value)
        self.move_to_end(key)
        while len(self) > self._limit:
            self.popitem(last=False)


class TokenBucket:
    """`burst` at once, `per_s` in the long run."""

    __slots__ = ("_at", "_burst", "_per_s", "_tokens")

    def __init__(self, per_s: float, burst: float) -> None:
        self._per_s, self._burst = per_s, burst
        self._tokens, self._at = burst, -1.0

    def take(self, now: float) -> bool:
        """Take one token if there is one. A clock that steps back adds nothing."""
        if self._at >= 0:
            gained = max(0.0, now - self._at) * self._per_s
            self._tokens = min(self._burst, self._tokens + gained)
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class Buckets(Generic[K]):
    """One bucket a key, for the `limit` keys that spoke last."""

    def __init__(self, per_s: float, burst: float, limit: int = 4096) -> None:
        self._per_s, self._burst = per_s, burst
        self._buckets: Bounded[K, TokenBucket] = Bounded(limit)

    def take(self, key: K, now: float) -> bool:
        bucket = self._buckets.get(key) or TokenBucket(self._per_s, self._burst)
        self._buckets[key] = bucket
        return bucket.take(now)
