from __future__ import annotations

import asyncio

import pytest

from shoal.api.turnstile import Turnstile

pytestmark = pytest.mark.anyio


async def enter(turnstile: Turnstile, order: list[int], number: int) -> None:
    await turnstile.enter()
    order.append(number)


async def test_a_crowd_comes_in_few_by_few_and_in_order() -> None:
    turnstile, order = Turnstile(per_turn=3), list[int]()
    crowd = [asyncio.create_task(enter(turnstile, order, number)) for number in range(20)]
    before = 0
    while len(order) < 20:
        await asyncio.sleep(0)  # one turn of the loop
        assert len(order) - before <= 3
        before = len(order)
    assert order == list(range(20))
    await asyncio.gather(*crowd)


async def test_one_alone_does_not_wait() -> None:
    turnstile = Turnstile(per_turn=3)
    for _ in range(10):
        entering = turnstile.enter()
        with pytest.raises(StopIteration):
            entering.send(None)
        await asyncio.sleep(0)


async def test_those_who_give_up_take_no_place() -> None:
    turnstile, order = Turnstile(per_turn=1), list[int]()
    crowd = [asyncio.create_task(enter(turnstile, order, number)) for number in range(6)]
    await asyncio.sleep(0)
    for gone in (1, 2, 4):
        crowd[gone].cancel()
    await asyncio.wait(crowd)
    assert order == [0, 3, 5]


async def test_it_rests_when_nobody_comes() -> None:
    turnstile = Turnstile(per_turn=1)
    await turnstile.enter()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    scheduled: list[object] = []
    loop = asyncio.get_running_loop()
    loop.call_soon, original = lambda *words, **more: scheduled.append(words), loop.call_soon
    try:
        turnstile._turn()
    finally:
        loop.call_soon = original
    assert scheduled == []
