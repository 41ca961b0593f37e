"""How far away each peer is, from pings on links that carry other things too. No clock of its own.

What delays a ping besides the way (a large frame before it, a busy loop at either end) only ever
adds: so the least of the last few counts, and a mean of those smooths what is left.
"""

from __future__ import annotations

from collections import deque

from ..units import NodeId

MAX_RTT_S = 20.0
PING_S = 5.0  # between two pings of one link; new links are asked more often
EAGER_PINGS = 4  # of a new link, one with each look at it
EAGER_S = 1.0  # an answer is given so long, there

_WINDOW = 8  # pings of which the least counts
_SMOOTHING = 0.25
_MAX_PEERS = 4096
_ANSWERED = -1


class Rtt:
    """The time there and back to one peer, in seconds; None before the first answer."""

    __slots__ = ("_recent", "seconds")

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=_WINDOW)
        self.seconds: float | None = None

    def measured(self, sample_s: float) -> None:
        """Take one more ping; an impossible one is left out."""
        if not 0 <= sample_s <= MAX_RTT_S:
            return
        self._recent.append(sample_s)
        least = min(self._recent)
        known = self.seconds
        self.seconds = least if known is None else known + _SMOOTHING * (least - known)


class Probes:
    """Which links to ping now, and what came of it. Times are seconds of the caller's clock."""

    def __init__(self) -> None:
        self._rtts: dict[NodeId, Rtt] = {}
        self._asked: dict[NodeId, tuple[int, float]] = {}  # the stamp that is out, and since when
        self._eager: dict[NodeId, int] = {}

    def fresh(self, node: NodeId) -> None:
        """There is a new link to that node: it is asked a few times soon."""
        self._asked.pop(node, None)
        self._eager[node] = EAGER_PINGS

    def ended(self, node: NodeId) -> None:
        """The link is gone; what was measured stays."""
        self._asked.pop(node, None)
        self._eager.pop(node, None)

    def ask(self, node: NodeId, now: float) -> int | None:
        """The stamp to send to that node now, if it is time."""
        stamp, at = self._asked.get(node, (_ANSWERED, now - PING_S))
        eager = self._eager.get(node, 0)
        soon = EAGER_S if stamp != _ANSWERED else 0.0
        if now - at < (soon if eager else PING_S):
            return None
        if eager:
            self._eager[node] = eager - 1
        stamp = int(now * 1e6) & 0xFFFFFFFF
        self._asked[node] = stamp, now
        return stamp

    def answered(self, node: NodeId, stamp: int, now: float) -> float | None:
        """The time there and back, smoothed. None when we did not ask that, or not last."""
        asked, at = self._asked.get(node, (_ANSWERED, 0.0))
        if asked != stamp or stamp == _ANSWERED:
            return None
        self._asked[node] = _ANSWERED, at  # a second answer to it means nothing
        rtt = self._rtts.pop(node, None) or Rtt()
        self._rtts[node] = rtt  # the dict is in order of the last answer
        if len(self._rtts) > _MAX_PEERS:
            del self._rtts[next(iter(self._rtts))]
        rtt.measured(now - at)
        return rtt.seconds

    def rtt(self, node: NodeId) -> float | None:
        known = self._rtts.get(node)
        return known.seconds if known else None
