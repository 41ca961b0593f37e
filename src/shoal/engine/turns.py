"""Whose turn it is when there is not enough for all: who has had least. Pure."""

from __future__ import annotations


class Turns:
    """Start-time fair queueing: each name's account begins where the others' are now, so that who
    was away gains nothing by it and owes nothing that others have since had.

    Of two names that always have something waiting, neither gets more than one turn ahead.
    """

    def __init__(self) -> None:
        self._had: dict[str, int] = {}  # only accounts that are ahead of `_now`
        self._now = 0  # where the last one to be served began

    def of(self, name: str) -> int:
        """The lowest goes next."""
        return max(self._had.get(name, 0), self._now)

    def charge(self, name: str, cost: int) -> None:
        """`name` has had its turn, of this size."""
        began = self.of(name)
        self._now = max(self._now, began)
        self._had[name] = began + cost
        self._had = {each: had for each, had in self._had.items() if had > self._now}
