"""When our load differs enough from what we said last to say it again."""

from __future__ import annotations

from collections.abc import Sequence

from .announcement import StageOffer

FACTOR = 2  # so often as much, or as little


def moved_much(said: Sequence[StageOffer], now: Sequence[StageOffer]) -> bool:
    """Did sessions, queue or free room of any stage double or halve?"""
    if len(said) != len(now):
        return True
    return any(_moved(old, new) for old, new in zip(said, now, strict=True))


def _moved(old: StageOffer, new: StageOffer) -> bool:
    """Counts from 1, so that the first session is a step and so is the last that ends; of the free
    room the used part counts as well, and a hundredth of the whole is nothing.
    """
    least = max(1, new.total_tokens // 100)
    used = old.total_tokens - old.free_tokens, new.total_tokens - new.free_tokens
    return (
        _apart(old.sessions + 1, new.sessions + 1)
        or _apart(old.queue + 1, new.queue + 1)
        or _apart(old.free_tokens + least, new.free_tokens + least)
        or _apart(max(0, used[0]) + 5 * least, max(0, used[1]) + 5 * least)
    )


def _apart(a: int, b: int) -> bool:
    return max(a, b) >= FACTOR * min(a, b)
