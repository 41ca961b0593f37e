import asyncio

import pytest

from shoal.bus.memory import MemoryBus, MemoryRelay

from .nodes import AMBER, BIRCH, CLUB, Ear, announcement

pytestmark = pytest.mark.anyio


async def heard_over(relay: MemoryRelay, count: int) -> list[int]:
    """Sequence numbers that arrive when amber announces `count` times."""
    birch = MemoryBus(BIRCH, CLUB, [relay])
    ear = Ear().at(birch)
    async with birch, MemoryBus(AMBER, CLUB, [relay]) as amber:
        for sequence in range(count):
            await amber.announce(announcement(AMBER, sequence))
        await asyncio.sleep(0.01)
        return [sequence for _, sequence in ear.heard()]


async def test_a_relay_loses_what_its_seed_says() -> None:
    first = await heard_over(MemoryRelay(loss=0.5, seed=3), 20)
    assert first == await heard_over(MemoryRelay(loss=0.5, seed=3), 20)
    assert 0 < len(first) < 20
    assert first != await heard_over(MemoryRelay(loss=0.5, seed=4), 20)


async def test_a_relay_delays_every_delivery() -> None:
    relay, loop = MemoryRelay(delay_s=0.05), asyncio.get_running_loop()
    birch = MemoryBus(BIRCH, CLUB, [relay])
    ear = Ear().at(birch)
    async with birch, MemoryBus(AMBER, CLUB, [relay]) as amber:
        started = loop.time()
        await amber.announce(announcement(AMBER))
        await ear.until(lambda: len(ear.announced) == 1)
        assert loop.time() - started >= 0.05


async def test_an_outage_begins_and_ends_by_itself() -> None:
    relay = MemoryRelay(outages=[(0.1, 0.3)])
    async with MemoryBus(AMBER, CLUB, [relay]) as amber:
        assert amber.status()[0].connected
        await Ear().until(lambda: not amber.status()[0].connected)
        await Ear().until(lambda: amber.status()[0].connected)


async def test_what_was_under_way_to_a_bus_that_left_is_not_delivered() -> None:
    relay = MemoryRelay(delay_s=0.01)
    birch = MemoryBus(BIRCH, CLUB, [relay])
    ear = Ear().at(birch)
    async with MemoryBus(AMBER, CLUB, [relay]) as amber:
        async with birch:
            await amber.announce(announcement(AMBER))
        await asyncio.sleep(0.03)
    assert ear.announced == []
