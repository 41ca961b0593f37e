"""Who is there, who has gone, and who came back."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import pytest

from shoal.bus.membership import Membership, MembershipConfig
from shoal.bus.memory import MemoryBus, MemoryRelay
from shoal.events import Event, NodeGone, NodeSeen
from shoal.identity import Identity
from tests.bus.nodes import AMBER, BIRCH, CLUB, announcement

pytestmark = pytest.mark.anyio


class Place:
    """Members that meet at one relay in memory."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self.relay, self.stack = MemoryRelay(), stack
        self.events: list[Event] = []

    async def member(
        self, identity: Identity, refresh_s: float = 60.0, lifetime_s: float = 60.0
    ) -> Membership:
        bus = MemoryBus(identity, CLUB, [self.relay])
        membership = Membership(
            bus,
            identity,
            lambda sequence: announcement(identity, sequence),
            emit=self.events.append,
            clock=time.monotonic,
            wall_clock=time.time,
            chance=random.Random(1),
            config=MembershipConfig(
                refresh_s=refresh_s, lifetime_s=lifetime_s, debounce_s=0.0, refute_s=0.0
            ),
        )
        await self.stack.enter_async_context(bus)
        task = asyncio.create_task(membership.run())
        self.stack.push_async_callback(asyncio.wait, {task})
        self.stack.callback(task.cancel)
        return membership


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    async with AsyncExitStack() as stack:
        yield Place(stack)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not holds():
            await asyncio.sleep(0.005)


async def test_members_see_each_other_and_a_goodbye_is_seen_at_once(place: Place) -> None:
    amber, birch = await place.member(AMBER), await place.member(BIRCH)
    await until(lambda: bool(amber.view.get(BIRCH.node) and birch.view.get(AMBER.node)))
    assert NodeSeen(BIRCH.node, BIRCH.name) in place.events
    await birch.leave()
    await until(lambda: amber.view.get(BIRCH.node) is None)
    assert NodeGone(BIRCH.node, "left") in place.events


async def test_what_changes_after_the_goodbye_does_not_take_it_back(place: Place) -> None:
    amber, birch = await place.member(AMBER), await place.member(BIRCH)
    await until(lambda: amber.view.get(BIRCH.node) is not None)
    birch.changed()  # it drains its stages, and has said goodbye before that is announced
    await birch.leave()
    birch.changed()
    await until(lambda: NodeGone(BIRCH.node, "left") in place.events)
    await asyncio.sleep(0.05)
    assert amber.view.get(BIRCH.node) is None


async def test_an_announcement_that_we_do_not_take_is_no_news(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.bus.view.MAX_NODES", 0)
    amber = await place.member(AMBER)
    heard: list[None] = []
    amber.on_change(lambda: heard.append(None))
    amber._on_announcement(announcement(BIRCH, 1))
    assert (heard, place.events) == ([], [])


async def test_a_member_that_falls_silent_is_forgotten(place: Place) -> None:
    amber = await place.member(AMBER, refresh_s=0.1)
    await place.member(BIRCH, refresh_s=60.0, lifetime_s=0.3)
    await until(lambda: amber.view.get(BIRCH.node) is not None)
    await until(lambda: amber.view.get(BIRCH.node) is None)
    assert NodeGone(BIRCH.node, "its announcement ran out") in place.events


async def test_a_suspect_stays_away_until_it_announces_itself_anew(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.bus.doubts.REFUTE_S", 0.05)
    amber, birch = await place.member(AMBER), await place.member(BIRCH)
    await until(lambda: amber.view.get(BIRCH.node) is not None)
    old = amber.view.get(BIRCH.node)
    assert old is not None
    place.relay.cut(BIRCH.node)
    amber.suspect(BIRCH.node)
    assert amber.doubtful() == {BIRCH.node}
    assert amber.view.get(BIRCH.node) is not None
    await until(lambda: amber.view.get(BIRCH.node) is None)
    assert amber.doubtful() == frozenset()
    assert NodeGone(BIRCH.node, "cannot be reached") in place.events
    amber._on_announcement(old)  # a relay repeats what it has stored
    assert amber.view.get(BIRCH.node) is None
    place.relay.heal()
    birch.changed()
    await until(lambda: amber.view.get(BIRCH.node) is not None)


async def test_a_node_that_hears_that_it_is_lost_says_at_once_that_it_lives(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.bus.doubts.REFUTE_S", 0.5)
    amber, birch = await place.member(AMBER), await place.member(BIRCH)
    await until(lambda: bool(amber.view.get(BIRCH.node) and birch.view.get(AMBER.node)))
    amber.suspect(BIRCH.node)
    await until(lambda: not amber.doubtful())
    assert amber.view.get(BIRCH.node) is not None
    assert not any(isinstance(event, NodeGone) for event in place.events)


async def test_listeners_hear_of_new_stages_but_not_of_mere_refreshes(place: Place) -> None:
    amber = await place.member(AMBER)
    heard: list[None] = []
    amber.on_change(lambda: heard.append(None))
    first = announcement(BIRCH, 1)
    amber._on_announcement(first)
    amber._on_announcement(announcement(BIRCH, 2))
    assert len(heard) == 1
    amber._on_announcement(announcement(BIRCH, 3, stages=()))
    assert len(heard) == 2
