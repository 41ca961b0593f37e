"""Whether the part of the mesh that we listen to is enough for us."""

from __future__ import annotations

from collections.abc import Callable, Collection

LOOK_S = 5.0  # looking for routes takes longer than being asked


class Needs:
    """True while one of `wanted` has no route. Looks again when the view has changed."""

    def __init__(
        self,
        wanted: Callable[[], Collection[str]],
        is_ready: Callable[[str], bool],
        clock: Callable[[], float],
    ) -> None:
        self._wanted, self._is_ready, self._clock = wanted, is_ready, clock
        self._missing, self._stale, self._looked_at = False, True, float("-inf")

    def changed(self) -> None:
        self._stale = True

    def __call__(self) -> bool:
        now = self._clock()
        if self._stale and now - self._looked_at >= LOOK_S:
            self._stale, self._looked_at = False, now
            self._missing = not all(map(self._is_ready, sorted(self._wanted())))
        return self._missing
