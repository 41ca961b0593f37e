"""What a stage has sent on for its sessions, so that it can be sent again to whoever takes the next
stage's place. Pure.

One budget for all sessions. Whoever would have more than there is loses the largest: all of it,
because a history without its end is of no use, and one without its beginning of little.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ..units import SessionId


@dataclass(slots=True)
class Kept:
    """One session: rows from token `first` on, without a gap. `width` is the bytes of one token."""

    first: int
    width: int
    rows: list[bytes] = field(default_factory=list)
    nbytes: int = 0

    @property
    def stop(self) -> int:
        return self.first + self.nbytes // self.width

    def truncate(self, stop: int) -> int:
        """Forget the tokens from `stop` on. Returns how many bytes these were."""
        gone = max(0, self.stop - max(stop, self.first)) * self.width
        left = gone
        while left:
            last = self.rows.pop()
            if len(last) > left:
                self.rows.append(last[: len(last) - left])
            left -= min(left, len(last))
        self.nbytes -= gone
        return gone

    def part(self, start: int, stop: int) -> bytes:
        low, high = ((at - self.first) * self.width for at in (start, stop))
        return b"".join(self._cut(low, high))

    def _cut(self, low: int, high: int) -> Iterator[bytes]:
        at = 0
        for row in self.rows:
            if at < high and at + len(row) > low:
                yield row[max(0, low - at) : high - at]
            at += len(row)


class History:
    """Of all sessions of a stage, `budget_bytes` at most."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._kept: dict[SessionId, Kept] = {}
        self._given_up: set[SessionId] = set()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, session: SessionId, start: int, count: int, hidden: memoryview) -> None:
        """`count` tokens from `start` on, which take the place of those kept from there on."""
        if session in self._given_up:
            return
        kept, width = self._kept.get(session), len(hidden) // count
        if kept is None or not kept.first <= start <= kept.stop or kept.width != width:
            self._let_go(session)
            kept = self._kept[session] = Kept(start, width)
        self.nbytes -= kept.truncate(start)
        kept.rows.append(bytes(hidden))  # a copy: the frame it came from is let go
        kept.nbytes += len(hidden)
        self.nbytes += len(hidden)
        while self.nbytes > self._budget_bytes:
            largest = max(self._kept, key=lambda each: (self._kept[each].nbytes, each))
            self._let_go(largest)
            self._given_up.add(largest)

    def first(self, session: SessionId) -> int | None:
        """The first token whose row is kept; None when nothing is."""
        kept = self._kept.get(session)
        return kept.first if kept is not None and kept.nbytes else None

    def part(self, session: SessionId, start: int, stop: int) -> bytes | None:
        """Their hidden states, or None where they are not kept (any more)."""
        kept = self._kept.get(session)
        if kept is None or not kept.first <= start < stop <= kept.stop:
            return None
        return kept.part(start, stop)

    def truncate(self, session: SessionId, stop: int) -> None:
        kept = self._kept.get(session)
        if kept is not None:
            self.nbytes -= kept.truncate(stop)

    def rename(self, session: SessionId, renamed: SessionId) -> None:
        if session in self._kept:
            self._kept[renamed] = self._kept.pop(session)
        if session in self._given_up:
            self._given_up.remove(session)
            self._given_up.add(renamed)

    def forget(self, session: SessionId) -> None:
        self._let_go(session)
        self._given_up.discard(session)

    def _let_go(self, session: SessionId) -> None:
        kept = self._kept.pop(session, None)
        self.nbytes -= kept.nbytes if kept is not None else 0
