import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import pytest

from shoal.errors import LinkClosed
from shoal.transport.race import first_success

pytestmark = pytest.mark.anyio


async def after(seconds: float, outcome: str, started: list[str]) -> str:
    started.append(outcome)
    await asyncio.sleep(seconds)
    if outcome.startswith("no"):
        raise LinkClosed(outcome)
    return outcome


Attempts = list[Callable[[], Coroutine[Any, Any, str]]]


def attempts(started: list[str], *plan: tuple[float, str]) -> Attempts:
    return [partial(after, seconds, outcome, started) for seconds, outcome in plan]


def nothing(result: str) -> None:
    raise AssertionError(f"{result} is not to be discarded")


async def test_the_first_to_arrive_wins_and_later_ones_are_not_started() -> None:
    started: list[str] = []
    race = attempts(started, (0.0, "one"), (0.0, "two"))
    assert await first_success(race, stagger_s=1.0, discard=nothing) == "one"
    assert started == ["one"]


async def test_a_slow_attempt_is_overtaken_and_cancelled() -> None:
    race = attempts([], (9.0, "slow"), (0.0, "quick"))
    assert await first_success(race, stagger_s=0.01, discard=nothing) == "quick"


async def test_a_failure_starts_the_next_attempt_at_once() -> None:
    race = attempts([], (0.0, "no"), (0.0, "yes"))
    async with asyncio.timeout(1):
        assert await first_success(race, stagger_s=9.0, discard=nothing) == "yes"


async def test_when_all_fail_every_reason_is_named() -> None:
    with pytest.raises(LinkClosed, match="no way; no answer"):
        await first_success(
            attempts([], (0.0, "no way"), (0.0, "no answer")), stagger_s=0.0, discard=nothing
        )
    with pytest.raises(LinkClosed, match="no address"):
        await first_success([], stagger_s=0.0, discard=nothing)


async def test_of_two_that_arrive_together_one_is_discarded() -> None:
    gate, discarded = asyncio.Event(), list[str]()

    async def wait(name: str) -> str:
        await gate.wait()
        return name

    race = asyncio.create_task(
        first_success(
            [partial(wait, "one"), partial(wait, "two")], stagger_s=0.0, discard=discarded.append
        )
    )
    await asyncio.sleep(0.02)
    gate.set()
    assert sorted([await race, *discarded]) == ["one", "two"]


async def test_a_bug_in_an_attempt_is_not_swallowed() -> None:
    async def broken() -> str:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        await first_success([broken], stagger_s=0.0, discard=nothing)
