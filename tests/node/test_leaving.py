"""A planned leave, in virtual time: what is waited for, and for how long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

from shoal.bus.membership import Membership
from shoal.errors import LinkClosed
from shoal.events import Event, Leaving
from shoal.node.leaving import GOODBYE_S, leave
from shoal.pipeline import Pipeline, Serving
from shoal.sim.loop import run


class House:
    """What a node has when it leaves; `log` is what happened to it, and when."""

    def __init__(self) -> None:
        self.sessions: list[str] = []  # on our one stage
        self.clients: list[str] = []
        self.log: list[tuple[str, float]] = []
        self.told: list[Event] = []
        self.hurry = asyncio.Event()
        self.goodbye: Callable[[], Any] = lambda: asyncio.sleep(0)
        worker = SimpleNamespace(sessions=self.sessions)
        self.slices = [SimpleNamespace(worker=worker), SimpleNamespace(worker=None)]
        self.gateway = self.clients

    def _note(self, what: str) -> None:
        self.log.append((what, round(asyncio.get_running_loop().time(), 1)))

    def drain(self) -> None:
        self._note("drain")

    def hand_over(self) -> None:
        self._note("hand over")

    def stop(self) -> None:
        self._note("stop")

    async def leave(self) -> None:
        self._note("goodbye")
        await self.goodbye()

    async def go(self, patience_s: float = 30.0) -> None:
        await leave(
            cast(Serving, self),
            cast(Pipeline, self),
            cast(Membership, self),
            patience_s=patience_s,
            hurry=self.hurry,
            emit=self.told.append,
        )

    def later(self, seconds: float, what: Callable[[], object]) -> None:
        asyncio.get_running_loop().call_later(seconds, what)


def left(scenario: Callable[[House], Any]) -> House:
    async def main() -> House:
        house = House()
        await scenario(house)
        return house

    return run(main)


def test_who_has_nothing_to_do_leaves_at_once_and_says_goodbye_before_it_stops() -> None:
    house = left(lambda house: house.go())
    assert house.log == [("drain", 0), ("hand over", 0), ("goodbye", 0), ("stop", 0)]


def test_goodbye_waits_for_sessions_and_for_our_own_clients() -> None:
    """Whoever still has a session with us must find us until it has ended."""

    async def scenario(house: House) -> None:
        house.sessions += ["one", "two"]
        house.clients += ["client"]
        house.later(1.1, house.sessions.pop)
        house.later(2.1, house.sessions.pop)
        house.later(4.1, house.clients.pop)
        await house.go()

    house = left(scenario)
    assert house.log[2:] == [("goodbye", 4.2), ("stop", 4.2)]
    told = [(each.sessions, each.answers) for each in house.told if isinstance(each, Leaving)]
    assert told == [(2, 1), (1, 1), (0, 1), (0, 0)]


def test_patience_ends() -> None:
    async def scenario(house: House) -> None:
        house.sessions += ["endless"]
        await house.go(patience_s=5.0)

    assert left(scenario).log[2:] == [("goodbye", 5), ("stop", 5)]


def test_who_is_hurried_goes_at_once() -> None:
    async def scenario(house: House) -> None:
        house.sessions += ["endless"]
        house.later(1.0, house.hurry.set)
        await house.go()

    assert left(scenario).log[2:] == [("goodbye", 1), ("stop", 1)]


def test_relays_that_do_not_answer_or_fail_do_not_keep_us() -> None:
    async def deaf(house: House) -> None:
        house.goodbye = lambda: asyncio.sleep(3600)
        await house.go()

    async def failing(house: House) -> None:
        async def fails() -> None:
            raise LinkClosed("no relay")

        house.goodbye = fails
        await house.go()

    assert left(deaf).log[-1] == ("stop", GOODBYE_S)
    assert left(failing).log[-1] == ("stop", 0)
