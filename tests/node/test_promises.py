"""A node that says for ever that it is loading keeps nobody from filling its place."""

from __future__ import annotations

from msgspec.structs import replace

from shoal.node.promises import LONGEST_S, Promises
from tests.bus.nodes import AMBER, BIRCH, STAGE, announcement

LOADING = announcement(AMBER, 1, stages=(replace(STAGE, state="joining"),))
SERVING = announcement(AMBER, 2)
OTHER = announcement(BIRCH, 1)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_who_loads_for_too_long_does_not_count() -> None:
    promises = Promises(clock := Clock())
    assert promises.kept([LOADING, OTHER]) == [LOADING, OTHER]
    clock.now = LONGEST_S
    assert promises.kept([LOADING, OTHER]) == [LOADING, OTHER]
    clock.now += 1.0
    assert promises.kept([replace(LOADING, sequence=9), OTHER]) == [OTHER]


def test_who_serves_in_the_end_counts_again() -> None:
    promises = Promises(clock := Clock())
    promises.kept([LOADING])
    clock.now = 2 * LONGEST_S
    assert promises.kept([SERVING]) == [SERVING]
    assert promises.kept([LOADING]) == [LOADING]
