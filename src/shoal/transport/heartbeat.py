"""When to say something, and when a silence has lasted too long. No clock of its own.

Any byte counts as a sign of life; a beat is sent only on a link that carries nothing else. What our
own loop slept through is not held against the peer, nor is a link that we do not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K")

_SOONEST_S = 0.001  # a sum of floats may lie just before the moment at which something is due
_EARLY = 0.75  # a beat may go out early, so that many links share one wake-up


@dataclass(kw_only=True, frozen=True, slots=True)
class HeartbeatConfig:
    beat_after_s: float = 0.25  # of our silence
    dead_after_s: float = 0.9  # of theirs: with timers and beats, a dead peer is noticed within 1 s


@dataclass(slots=True)
class Pulse:
    """The last signs of life on one link, in seconds of the loop's clock."""

    heard_at: float
    said_at: float
    deaf: bool = False  # we are not reading: silence means nothing


@dataclass(frozen=True, slots=True)
class Findings(Generic[K]):
    beat: list[K]  # say something to these
    dead: list[K]  # give these up
    next_in_s: float  # look again then


def check(
    pulses: Mapping[K, Pulse], now: float, late_s: float, config: HeartbeatConfig
) -> Findings[K]:
    """Look at all links. `late_s` is how much later than planned this look happens."""
    beat, dead, due = [], [], now + config.beat_after_s
    for key, pulse in pulses.items():
        pulse.heard_at = min(now, pulse.heard_at + late_s)
        if not pulse.deaf and now - pulse.heard_at >= config.dead_after_s:
            dead.append(key)
            continue
        if now - pulse.said_at >= _EARLY * config.beat_after_s:
            beat.append(key)
        else:
            due = min(due, pulse.said_at + config.beat_after_s)
        if not pulse.deaf:
            due = min(due, pulse.heard_at + config.dead_after_s)
    return Findings(beat, dead, max(_SOONEST_S, due - now))
