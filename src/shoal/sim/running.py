"""Runs a scenario: lets nodes join, go and fall silent, and clients ask, when it says so."""

from __future__ import annotations

import asyncio
import csv
import math
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path

from ..errors import BadConfig
from .asked import Asked
from .building import Regions, build, machine
from .loop import run
from .report import Report, Sample, measure
from .scenario import Churn, NodeType, Partition, Requests, Scenario, Spread
from .world import Listener, World, identity_of

TICK_S = 10.0  # between two samples of what goes on
WIND_DOWN_S = 900.0  # after the end, what is under way may end in peace for so long


Progress = Callable[[Sample], None]


def simulate(
    scenario: Scenario,
    *,
    seed: int | None = None,
    progress: Progress = lambda sample: None,
    listener: Listener | None = None,
    folder: Path = Path(),
) -> Report:
    """The whole scenario. Traces are looked for in `folder`. Raises BadConfig for a bad trace."""
    running = Running(scenario, scenario.seed if seed is None else seed, progress, folder)
    if listener is not None:
        running.listeners.append(listener)
    return run(running.main, limit_s=scenario.duration_s + WIND_DOWN_S + 60)


class Running:
    """One run. All chance comes from its seed, each part's from one of its own."""

    def __init__(self, scenario: Scenario, seed: int, progress: Progress, folder: Path) -> None:
        self.scenario, self.seed, self.folder = scenario, seed, folder
        self.listeners: list[Listener] = []
        self.samples: list[Sample] = []
        self._progress = progress
        self._regions = Regions(scenario.links)
        self._counts = {kind.name: 0 for kind in scenario.nodes}  # nodes so far, by type
        self._number = 0
        self._leaving: dict[str, asyncio.Task[None]] = {}
        self._world: World
        self._asked_types = {name for each in scenario.requests for name in each.gateways}

    async def main(self) -> Report:
        scenario = self.scenario
        async with build(scenario, self.seed, self._regions) as self._world:
            self._world.listeners += self.listeners
            parts = [self._join(kind) for kind in scenario.nodes]
            parts += [self._churn(churn, at) for at, churn in enumerate(scenario.churn)]
            parts += [self._partition(each) for each in scenario.partitions]
            parts += [self._ask(each, at) for at, each in enumerate(scenario.requests)]
            tasks = [asyncio.ensure_future(part) for part in (*parts, self._sample())]
            with suppress(TimeoutError):
                async with asyncio.timeout(scenario.duration_s):
                    await asyncio.gather(*tasks)
            await asyncio.gather(*tasks, *self._leaving.values(), return_exceptions=True)
            report = measure(self._world, scenario, self.samples)
            await self._wind_down()
            report.count_endings(self._world.asked)
        return report

    async def _wind_down(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(WIND_DOWN_S):
                for asked in list(self._world.asked):
                    await asked.done.wait()

    def _chance(self, *what: object) -> random.Random:
        return random.Random(f"{self.seed} {what}")

    # ---- nodes

    async def _join(self, kind: NodeType) -> None:
        chance = self._chance("join", kind.name)
        times = sorted(chance.uniform(0, kind.join_within_s) for _ in range(kind.count))
        for at_s in times:
            await self._until(at_s)
            await self._join_one(kind, chance)

    async def _join_one(self, kind: NodeType, chance: random.Random) -> None:
        self._counts[kind.name] += 1
        self._number += 1
        self._regions.of[identity_of(self.seed, self._number).node] = kind.region
        await self._world.join(
            machine(kind, self._world.around.models),
            f"{kind.name}-{self._counts[kind.name]}",
            number=self._number,
            skew_s=chance.uniform(-kind.clock_skew_s, kind.clock_skew_s),
        )

    async def _churn(self, churn: Churn, at: int) -> None:
        chance = self._chance("churn", at)
        rates = {
            self._newcomer: churn.joins_per_h,
            self._goodbye: churn.leaves_per_h,
            self._death: churn.kills_per_h,
            self._sleep: churn.stops_per_h,
        }
        total = sum(rates.values()) / 3600
        await self._until(churn.from_s)
        while total and self._world.now < churn.until_s:
            await asyncio.sleep(chance.expovariate(total))
            if self._world.now < churn.until_s:
                (what,) = chance.choices(list(rates), list(rates.values()))
                await what(churn, chance)

    async def _newcomer(self, churn: Churn, chance: random.Random) -> None:
        kinds = [
            kind for kind in self.scenario.nodes if kind.name in churn.types or not churn.types
        ]
        (kind,) = chance.choices(kinds, [max(1, kind.count) for kind in kinds])
        await self._join_one(kind, chance)

    async def _goodbye(self, churn: Churn, chance: random.Random) -> None:
        """It takes its time, and nobody waits for it."""
        if (name := self._victim(churn, chance)) is not None:
            self._leaving[name] = asyncio.ensure_future(self._world.leave(name))

    def _victim(self, churn: Churn, chance: random.Random) -> str | None:
        names = [
            name
            for name, node in self._world.nodes.items()
            if (node.machine.kind in churn.types or not churn.types)
            and node.machine.kind not in self._asked_types
            and name not in self._leaving
        ]
        return chance.choice(names) if names else None

    async def _death(self, churn: Churn, chance: random.Random) -> None:
        if (name := self._victim(churn, chance)) is not None:
            await self._world.kill(name)

    async def _sleep(self, churn: Churn, chance: random.Random) -> None:
        if (name := self._victim(churn, chance)) is not None:
            self._world.stop(name)
            loop = asyncio.get_running_loop()
            loop.call_later(churn.stop_s, self._wake, name)

    def _wake(self, name: str) -> None:
        if name in self._world.nodes:
            self._world.resume(name)

    async def _partition(self, told: Partition) -> None:
        await self._until(told.at_s)
        world = self._world
        inside = [name for name, node in world.nodes.items() if node.machine.region in told.regions]
        outside = [name for name in world.nodes if name not in set(inside)]
        world.partition(inside, outside, off_relays=() if told.relays else inside)
        await asyncio.sleep(told.for_s)
        world.heal()

    # ---- requests

    async def _ask(self, told: Requests, at: int) -> None:
        chance = self._chance("requests", at)
        await self._until(told.from_s)
        if told.arrivals == "closed":
            await asyncio.gather(*(self._one_by_one(told, chance) for _ in range(told.at_once)))
            return
        async for prompt, output in self._arrivals(told, chance):
            if self._world.now >= told.until_s:
                break
            self._request(told, chance, prompt, output)

    async def _one_by_one(self, told: Requests, chance: random.Random) -> None:
        while self._world.now < told.until_s:
            asked = self._request(
                told, chance, draw(told.prompt_tokens, chance), draw(told.output_tokens, chance)
            )
            if asked is not None:
                await asked.done.wait()
            if asked is None or asked.outcome != "whole":
                await asyncio.sleep(1)  # as a client that was refused would

    async def _arrivals(
        self, told: Requests, chance: random.Random
    ) -> AsyncIterator[tuple[int, int]]:
        """Prompt and output tokens, each at its time."""
        if told.arrivals == "trace":
            for at_s, prompt, output in read_trace(self.folder / told.trace):
                await self._until(told.from_s + at_s)
                yield prompt, output
            return
        shape = 1.0 if told.arrivals == "poisson" else 1 / told.burstiness
        while told.rate_per_s:
            await asyncio.sleep(chance.gammavariate(shape, 1 / (shape * told.rate_per_s)))
            yield draw(told.prompt_tokens, chance), draw(told.output_tokens, chance)

    def _request(
        self, told: Requests, chance: random.Random, prompt: int, output: int
    ) -> Asked | None:
        """None where there is nobody to ask."""
        world = self._world
        gateways = [
            name
            for name, node in world.nodes.items()
            if node.machine.gateway
            and (node.machine.kind in told.gateways or not told.gateways)
            and name not in self._leaving
        ]
        if not gateways:
            return None
        return world.request(
            told.model,
            chance.randbytes(prompt),  # any tokens will do, as long as no two prompts are alike
            output,
            gateway=chance.choice(gateways),
            patience_s=told.patience_s,
        )

    # ---- time

    async def _until(self, at_s: float) -> None:
        await asyncio.sleep(max(0.0, at_s - self._world.now))

    async def _sample(self) -> None:
        done = 0
        while True:
            await self._world.sleep(TICK_S)
            tokens = sum(len(asked.tokens) for asked in self._world.asked)
            running = sum(asked.outcome == "running" for asked in self._world.asked)
            now, nodes = self._world.now, len(self._world.nodes)
            self.samples.append(Sample(now, nodes, (tokens - done) / TICK_S, running))
            self._progress(self.samples[-1])
            done = tokens


def draw(told: Spread, chance: random.Random) -> int:
    """A number of tokens, at least one."""
    if not told.spread:
        return min(told.most, max(1, round(told.mean)))
    sigma = math.sqrt(math.log1p(told.spread**2))
    drawn = chance.lognormvariate(math.log(told.mean) - sigma**2 / 2, sigma)
    return min(told.most, max(1, round(drawn)))


def read_trace(path: Path) -> Iterator[tuple[float, int, int]]:
    """Seconds, prompt tokens, output tokens of each request, by time. Raises BadConfig."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [
                (float(row["at_s"]), int(row["prompt_tokens"]), int(row["output_tokens"]))
                for row in csv.DictReader(file)
            ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"the trace {path} cannot be read: {type(error).__name__}: {error}"
        hint = "a CSV file with the columns at_s, prompt_tokens, output_tokens"
        raise BadConfig(why, hint=hint) from None
    yield from sorted(rows)
