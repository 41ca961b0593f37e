"""Follows the mesh: everything between "the view changed" and "this slice is in service".

What to hold is `placement`'s to decide. This file knows when to ask it, that it has to be asked
again before anything is done, and how one slice is left for another: whoever moves says so first,
looks whether it is still wanted of it now that the others know, lets its sessions end or hands them
over, and loads then.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from ..errors import ShoalError
from ..placement import Decision
from ..units import ModelId, Slice

View = TypeVar("View")


@dataclass(frozen=True, slots=True)
class Holding:
    model: ModelId
    layers: Slice


class Stages(Protocol):
    """What this node serves, as the placer sees it."""

    def held(self) -> Holding | None:
        """What is in service or being loaded."""

    def drain(self) -> None:
        """Take no new session, and announce that."""

    def resume(self) -> None:
        """Take new sessions again."""

    async def vacate(self, patience_s: float) -> None:
        """Back when no session is left here, or time is up."""

    async def serve(self, model: ModelId, layers: Slice) -> None:
        """Give up what is held, load this and put it into service. Raises ShoalError."""


@dataclass(kw_only=True, frozen=True, slots=True)
class PlacerConfig:
    settle_s: float = 0.5  # between a change of the view and a look at it; up to twice as long
    look_s: float = 60.0  # between two looks when nothing changes: demand and speeds drift
    drain_s: float = 30.0  # for running sessions to end or be handed over before a move
    retry_s: float = 60.0  # after a slice could not be loaded; doubled each time
    max_retry_s: float = 3600.0
    share: float = 0.1  # of the time that goes into deciding, at most, while the mesh changes


@dataclass(frozen=True, slots=True)
class Rest:
    wait_s: float  # look again then, or when the view changes


@dataclass(frozen=True, slots=True)
class Move:
    to: Holding


@dataclass
class Following:
    """What to do about one decision after the other: no clock, no task."""

    config: PlacerConfig
    wanted: Holding | None = None  # for which we wait our turn
    _due: float = 0.0
    _failures: dict[Holding, tuple[int, float]] = field(default_factory=dict)  # times, next try

    def decided(self, decision: Decision, held: Holding | None, now: float) -> Rest | Move:
        """One counts once it has come out the same for as long as it asked us to wait."""
        target = _target(decision)
        if target is None or target == held:
            self.wanted = None
            return Rest(self.config.look_s)
        _, retry_at = self._failures.get(target, (0, now))
        if now < retry_at:
            self.wanted = None
            return Rest(min(self.config.look_s, retry_at - now))
        due = now + decision.wait_s
        self._due = min(self._due, due) if target == self.wanted else due
        self.wanted = target
        return Move(target) if now >= self._due else Rest(self._due - now)

    def failed(self, target: Holding, now: float) -> None:
        """It could not be loaded: another try comes later, and ever later."""
        times, _ = self._failures.get(target, (0, 0.0))
        wait_s = min(self.config.max_retry_s, self.config.retry_s * 2**times)
        self._failures[target] = times + 1, now + wait_s
        self.wanted = None

    def served(self, target: Holding) -> None:
        self._failures.pop(target, None)
        self.wanted = None


def _target(decision: Decision) -> Holding | None:
    if decision.model is None or decision.layers is None:
        return None
    return Holding(decision.model, decision.layers)


class Placer(Generic[View]):
    """`view` gives what `decide` needs, by what is known now; our own stage is in it as if it were
    not draining. `decide` is pure and may take long: `run_apart` calls it, in a thread for example.
    """

    def __init__(
        self,
        view: Callable[[], View],
        decide: Callable[[View], Decision],
        stages: Stages,
        *,
        run_apart: Callable[[Callable[[], Decision]], Awaitable[Decision]],
        clock: Callable[[], float],
        chance: random.Random,
        config: PlacerConfig | None = None,
    ) -> None:
        self._view, self._decide, self._stages = view, decide, stages
        self._run_apart, self._clock, self._chance = run_apart, clock, chance
        self.config = config or PlacerConfig()
        self._following = Following(self.config)
        self._changed = asyncio.Event()
        self._took_s = 0.0  # to make the last decision
        self.decision: Decision | None = None  # the newest

    def changed(self) -> None:
        """The view is another one, or what we could serve."""
        self._changed.set()

    async def start(self) -> bool:
        """Choose the first slice and put it into service; False where none is wanted of us, or
        fits. Raises what loading raises.
        """
        while True:
            step = await self._look()
            if isinstance(step, Move):
                await self._move(step.to)
            elif self._following.wanted is None:
                return self._stages.held() is not None
            else:
                await self._pause(step.wait_s)

    async def run(self) -> None:
        """Follow the mesh: forever."""
        step: Rest | Move = Rest(self.config.look_s)
        while True:
            if isinstance(step, Rest):
                await self._pause(step.wait_s)
            else:
                try:
                    await self._move(step.to)
                except ShoalError:  # told as an event
                    self._following.failed(step.to, self._clock())
            step = await self._look()

    async def _look(self) -> Rest | Move:
        """Ask placement by the view of now: what changes from here on is looked at again."""
        self._changed.clear()
        started, view = self._clock(), self._view()
        self.decision = await self._run_apart(lambda: self._decide(view))
        now = self._clock()
        self._took_s = now - started
        return self._following.decided(self.decision, self._stages.held(), now)

    async def _pause(self, wait_s: float) -> None:
        """Until the view has changed and settled, or for `wait_s`."""
        try:
            async with asyncio.timeout(wait_s):
                await self._changed.wait()
        except TimeoutError:
            return
        await self._settle()

    async def _settle(self) -> None:
        """The more a decision costs, the rarer it is made."""
        quiet_s = self.config.settle_s * self._chance.uniform(1, 2)
        await asyncio.sleep(max(quiet_s, self._took_s / self.config.share))

    async def _move(self, to: Holding) -> None:
        if self._stages.held() is not None and not await self._vacated(to):
            return
        await self._stages.serve(to.model, to.layers)
        self._following.served(to)

    async def _vacated(self, to: Holding) -> bool:
        """Two that hold the same layers may leave them at the same moment, each counting on the
        other: so we say that we go, and look again before we do.
        """
        self._stages.drain()
        vacated = False
        try:
            await self._settle()
            if await self._look() == Move(to):
                await self._stages.vacate(self.config.drain_s)
                vacated = True
        finally:
            if not vacated:
                self._stages.resume()
        return vacated
