"""When a node asks what to hold, and how it gets there."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from shoal.errors import NoCapacity
from shoal.node.placing import Following, Holding, Move, Placer, PlacerConfig, Rest
from shoal.placement import Decision
from shoal.sim.loop import run
from shoal.units import ModelId, Slice

MODEL, OTHER = ModelId("m1"), ModelId("m2")
CONFIG = PlacerConfig()
LOW, HIGH = Slice(0, 4), Slice(4, 8)


NOTHING = Decision(None, None)


class Desk:
    """The stages of a node that holds `now`; `log` is what was asked of them, and when."""

    def __init__(self, now: Holding | None = None) -> None:
        self.now = now
        self.log: list[tuple[float, str]] = []
        self.clock: Callable[[], float] = float
        self.unloadable: set[Slice] = set()
        self.load_s = self.vacate_s = 0.0

    def _note(self, what: str) -> None:
        self.log.append((round(self.clock(), 3), what))

    def held(self) -> Holding | None:
        return self.now

    def drain(self) -> None:
        self._note("drain")

    def resume(self) -> None:
        self._note("resume")

    async def vacate(self, patience_s: float) -> None:
        await asyncio.sleep(min(patience_s, self.vacate_s))
        self._note("vacated")

    async def serve(self, model: ModelId, layers: Slice) -> None:
        self.now = None
        await asyncio.sleep(self.load_s)
        if layers in self.unloadable:
            self._note(f"failed {layers}")
            raise NoCapacity("too large")
        self.now = Holding(model, layers)
        self._note(f"serve {model} {layers}")

    def did(self) -> list[str]:
        return [what for _, what in self.log]


class Mesh:
    """The view is what placement will say to it."""

    def __init__(self, *, decide_s: float = 0.0, desk: Desk | None = None) -> None:
        self.says, self.asked = NOTHING, 0
        self.desk = desk or Desk()
        self._decide_s = decide_s

    def placer(self, config: PlacerConfig = CONFIG) -> Placer[Decision]:
        loop = asyncio.get_running_loop()
        self.desk.clock = loop.time
        return Placer(
            lambda: self.says,
            self._decide,
            self.desk,
            run_apart=self._apart,
            clock=loop.time,
            chance=random.Random(1),
            config=config,
        )

    def _decide(self, pool: Decision) -> Decision:
        self.asked += 1
        return pool

    async def _apart(self, decide: Callable[[], Decision]) -> Decision:
        await asyncio.sleep(self._decide_s)
        return decide()

    def say(self, placer: Placer[Decision], says: Decision) -> None:
        self.says = says
        placer.changed()


def in_virtual_time(story: Callable[[], Coroutine[Any, Any, None]]) -> None:
    run(story)


# ---- the pure part


def test_a_decision_without_a_wait_is_followed_at_once() -> None:
    assert Following(CONFIG).decided(Decision(MODEL, LOW), None, 0.0) == Move(Holding(MODEL, LOW))


def test_a_decision_is_followed_once_it_has_stood_as_long_as_it_asked_for() -> None:
    following, said = Following(CONFIG), Decision(MODEL, LOW, wait_s=2.0)
    assert following.decided(said, None, 10.0) == Rest(2.0)
    assert following.decided(said, None, 11.5) == Rest(0.5)
    assert following.decided(said, None, 12.0) == Move(Holding(MODEL, LOW))


def test_another_decision_begins_to_wait_anew() -> None:
    following = Following(CONFIG)
    following.decided(Decision(MODEL, LOW, wait_s=2.0), None, 10.0)
    assert following.decided(Decision(MODEL, HIGH, wait_s=2.0), None, 11.0) == Rest(2.0)
    assert following.decided(Decision(MODEL, LOW, wait_s=2.0), None, 12.5) == Rest(2.0)


def test_a_decision_that_grew_urgent_waits_no_longer() -> None:
    following = Following(CONFIG)
    following.decided(Decision(MODEL, LOW, wait_s=5.0), None, 10.0)
    assert following.decided(Decision(MODEL, LOW), None, 10.1) == Move(Holding(MODEL, LOW))


def test_what_could_not_be_loaded_is_tried_again_later_and_ever_later() -> None:
    following, said, target = Following(CONFIG), Decision(MODEL, LOW), Holding(MODEL, LOW)
    waits = []
    now = 0.0
    for _ in range(9):
        following.failed(target, now)
        wait_s = 0.0
        while following.decided(said, None, now + wait_s) != Move(target):
            wait_s += 30.0
        waits.append(wait_s)
        now += wait_s
    assert waits[:3] == [60.0, 120.0, 240.0]
    assert waits[-1] == CONFIG.max_retry_s
    following.served(target)
    following.failed(target, now)
    assert following.decided(said, None, now + 60.0) == Move(target)


# ---- the shell


def test_a_new_node_serves_what_is_wanted_of_it() -> None:
    async def story() -> None:
        mesh = Mesh()
        mesh.says = Decision(MODEL, LOW, wait_s=1.0)
        assert await mesh.placer().start()
        assert mesh.desk.log == [(1.0, "serve m1 0:4")]
        assert mesh.asked == 3  # before the wait, after it, and whether all is well now

    in_virtual_time(story)


def test_a_new_node_of_which_nothing_is_wanted_is_free() -> None:
    async def story() -> None:
        mesh = Mesh()
        assert not await mesh.placer().start()

    in_virtual_time(story)


def test_what_the_first_load_raises_reaches_whoever_started_the_node() -> None:
    async def story() -> None:
        mesh = Mesh()
        mesh.says, mesh.desk.unloadable = Decision(MODEL, LOW), {LOW}
        with pytest.raises(NoCapacity):
            await mesh.placer().start()

    in_virtual_time(story)


def test_whoever_waits_for_its_turn_and_sees_another_fill_the_hole_stays() -> None:
    async def story() -> None:
        mesh = Mesh(desk=Desk(Holding(MODEL, LOW)))
        placer = mesh.placer()
        following = asyncio.ensure_future(placer.run())
        mesh.say(placer, Decision(MODEL, HIGH, wait_s=5.0))
        await asyncio.sleep(3)
        mesh.say(placer, Decision(MODEL, LOW))
        await asyncio.sleep(100)
        following.cancel()
        assert mesh.desk.log == []

    in_virtual_time(story)


def test_a_node_that_moves_drains_then_waits_for_its_sessions_then_loads() -> None:
    async def story() -> None:
        mesh = Mesh(desk=Desk(Holding(MODEL, LOW)))
        mesh.desk.vacate_s = 4.0
        placer = mesh.placer()
        following = asyncio.ensure_future(placer.run())
        mesh.say(placer, Decision(OTHER, HIGH))
        await asyncio.sleep(20)
        following.cancel()
        assert mesh.desk.did() == ["drain", "vacated", "serve m2 4:8"]
        drained, vacated = mesh.desk.log[0][0], mesh.desk.log[1][0]
        assert 4.5 <= vacated - drained <= 5.0

    in_virtual_time(story)


def test_who_said_that_it_goes_and_is_needed_after_all_stays() -> None:
    async def story() -> None:
        mesh = Mesh(desk=Desk(Holding(MODEL, LOW)))
        placer = mesh.placer()
        drain = mesh.desk.drain

        def drain_while_the_other_goes_too() -> None:
            drain()
            mesh.say(placer, Decision(MODEL, LOW))

        mesh.desk.drain = drain_while_the_other_goes_too  # type: ignore[method-assign]
        following = asyncio.ensure_future(placer.run())
        mesh.say(placer, Decision(MODEL, HIGH))
        await asyncio.sleep(20)
        following.cancel()
        assert mesh.desk.did() == ["drain", "resume"]
        assert mesh.desk.now == Holding(MODEL, LOW)

    in_virtual_time(story)


def test_a_node_that_is_stopped_while_it_drains_does_not_drain_for_ever() -> None:
    async def story() -> None:
        mesh = Mesh(desk=Desk(Holding(MODEL, LOW)))
        mesh.desk.vacate_s = 1000.0
        placer = mesh.placer()
        following = asyncio.ensure_future(placer.run())
        mesh.say(placer, Decision(MODEL, HIGH))
        await asyncio.sleep(5)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        assert mesh.desk.did() == ["drain", "resume"]

    in_virtual_time(story)


def test_what_changes_while_a_slice_is_loaded_is_not_missed() -> None:
    async def story() -> None:
        mesh = Mesh()
        mesh.desk.load_s = 10.0
        placer = mesh.placer()
        following = asyncio.ensure_future(placer.run())
        mesh.say(placer, Decision(MODEL, LOW))
        await asyncio.sleep(5)
        mesh.say(placer, Decision(MODEL, HIGH))
        await asyncio.sleep(25)
        following.cancel()
        assert mesh.desk.did() == ["serve m1 0:4", "drain", "vacated", "serve m1 4:8"]

    in_virtual_time(story)


def test_a_slice_that_cannot_be_loaded_is_left_alone_for_a_while() -> None:
    async def story() -> None:
        mesh = Mesh()
        mesh.desk.unloadable = {LOW}
        placer = mesh.placer()
        following = asyncio.ensure_future(placer.run())
        mesh.say(placer, Decision(MODEL, LOW))
        for _ in range(50):
            await asyncio.sleep(1)
            placer.changed()
        assert mesh.desk.did() == ["failed 0:4"]
        mesh.desk.unloadable = set()
        await asyncio.sleep(30)
        assert mesh.desk.did() == ["failed 0:4", "serve m1 0:4"]
        following.cancel()

    in_virtual_time(story)


def test_without_any_change_a_node_looks_once_in_a_while() -> None:
    async def story() -> None:
        mesh = Mesh()
        following = asyncio.ensure_future(mesh.placer().run())
        await asyncio.sleep(10 * CONFIG.look_s + 1)
        following.cancel()
        assert mesh.asked == 10

    in_virtual_time(story)


def test_a_mesh_that_never_rests_takes_a_tenth_of_our_time_for_decisions() -> None:
    async def story() -> None:
        mesh = Mesh(decide_s=1.0)
        placer = mesh.placer()
        following = asyncio.ensure_future(placer.run())
        for _ in range(1000):
            placer.changed()
            await asyncio.sleep(0.11)
        following.cancel()
        assert 9 <= mesh.asked <= 11

    in_virtual_time(story)
