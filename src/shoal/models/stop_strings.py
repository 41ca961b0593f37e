"""Finds stop strings in text that arrives in pieces. Knows nothing of tokens."""

from __future__ import annotations

from collections.abc import Iterable


class StopStrings:
    """Lets text through up to the first stop string, holding back what may become one.

    The first is the one that ends first, and of those the longest. How the text is cut into pieces
    does not change what comes out in all. Empty stop strings are passed over.
    """

    def __init__(self, stops: Iterable[str] = ()) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Take a piece; returns what may be shown now, and whether a stop string was met."""
        if self.stopped:
            return "", True
        text = self._held + text
        found = self._first(text)
        self.stopped = found is not None
        keep = len(text) - self._partial(text) if found is None else found
        self._held = "" if self.stopped else text[keep:]
        return text[:keep], self.stopped

    def flush(self) -> str:
        """What was held back, once no more text will come."""
        held, self._held = self._held, ""
        return held

    def _first(self, text: str) -> int | None:
        """Where the first stop string begins."""
        starts = ((text.find(stop), len(stop)) for stop in self._stops)
        ends = [(start + length, start) for start, length in starts if start >= 0]
        return min(ends)[1] if ends else None

    def _partial(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        return max((overlap(text, stop) for stop in self._stops), default=0)


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, but is not all of."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
