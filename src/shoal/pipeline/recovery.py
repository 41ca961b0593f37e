"""How a route that was mended starts again: who sends what once more, who computes what once more.
Pure.

Every stage that goes on has in its cache the tokens up to some position, and keeps what it sent on
of them, from some position on. What the next stage lacks comes from what is kept, or has to be
computed again; and who computes again needs, in turn, what the stage before it sent. So it is
decided from the tail to the head, whose token ids the gateway always has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cache:
    """What one stage has: the first `tokens` computed, those from `kept_from` on to be sent again.
    A stage that is new has nothing.
    """

    tokens: int = 0
    kept_from: int = 0


@dataclass(frozen=True, slots=True)
class Restart:
    """What one stage is told: the next stage has all tokens before `send_from`. `replayed` tokens
    are sent again without being computed again.
    """

    send_from: int
    redo: bool
    replayed: int = 0


def restarts(caches: Sequence[Cache]) -> list[Restart]:
    """For the stages of a route, in order."""
    told: list[Restart] = []
    wanted: int | None = None  # the first token whose row the next stage waits for
    for cache in reversed(caches):
        send_from = 0 if wanted is None else wanted
        missing = wanted is not None and wanted < cache.tokens
        redo = missing and send_from < cache.kept_from
        replayed = cache.tokens - send_from if missing and not redo else 0
        told.append(Restart(send_from, redo, replayed))
        wanted = 0 if redo else cache.tokens
    return told[::-1]
