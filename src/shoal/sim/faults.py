"""Random faults by seed: a story is all that will be done to a mesh and asked of it. It is made of
its seed alone, can be read, and plays the same every time.

What must hold, whatever happens: the text is right as far as it came; each request ends in a whole
answer or in one error; once it is quiet nobody holds anything for anybody; and once the faults are
over and the nodes are back, the model is covered and asked for with success.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from ..bus.memory import MemoryRelay
from ..hardware import Speed
from ..transport import MemoryConfig, MemoryNetwork
from .asked import Asked
from .engine import more_bytes
from .liars import LIES, Lie, make_liar
from .loop import run
from .machine import Machine
from .model import SimModel
from .world import World

BEGIN_S = 20.0  # by then the mesh has settled
ANSWERED_S = 300.0  # after the last fault every request has ended
FREE_S = 120.0  # after that nobody holds anything any more
COVERED_S = 120.0  # after the last fault every gateway has a route
SETTLED_S = 6.0  # until the last node that could not be reached is dialled anew
LIMIT_S = 3600.0

What = Literal[
    "ask", "kill", "power off", "stop", "leave", "partition", "relay down", "slow", "lie"
]
WEIGHTS: dict[What, int] = {
    "kill": 4,
    "power off": 3,
    "stop": 4,
    "leave": 2,
    "partition": 3,
    "relay down": 2,
    "slow": 2,
    "lie": 3,
}


@dataclass(frozen=True, slots=True)
class Act:
    """From `at_s` on, for `for_s` seconds: killed nodes come back, what was stopped goes on."""

    at_s: float
    what: What
    names: tuple[str, ...]
    for_s: float = 0.0
    number: int = 0  # of the relay, of tokens asked for, of times as slow
    lie: Lie = "garbage"

    def __str__(self) -> str:
        more = {"ask": f"{self.number} tokens", "slow": f"{self.number} times", "lie": self.lie}
        parts = (*self.names, more.get(self.what, ""))
        until = f"until {self.at_s + self.for_s:7.2f} s" if self.for_s else " " * 16
        return f"{self.at_s:7.2f} s  {until}  {self.what:10}  {' '.join(filter(None, parts))}"


@dataclass(frozen=True, slots=True)
class Story:
    """`skews_s` has the error of each node's wall clock, in their order."""

    seed: int
    layers: int
    memories: tuple[int, ...]  # layers that each node can hold
    skews_s: tuple[float, ...]
    relays: int
    jitter_s: float
    acts: tuple[Act, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"n{number}" for number in range(1, len(self.memories) + 1))

    @property
    def lies(self) -> frozenset[Lie]:
        return frozenset(act.lie for act in self.acts if act.what == "lie")

    def __str__(self) -> str:
        head = (
            f"seed {self.seed}: {self.layers} layers on nodes that hold {list(self.memories)}, "
            f"clocks off by {list(self.skews_s)} s, {self.relays} relays, "
            f"jitter {1000 * self.jitter_s:.0f} ms"
        )
        return "\n".join((head, *map(str, self.acts)))


class Broken(AssertionError):
    """A promise was not kept: the message has the story."""


@dataclass(frozen=True, slots=True)
class Length:
    """How much happens in a story, at most."""

    nodes: int = 12
    faults: int = 7
    requests: int = 14
    tokens: tuple[int, ...] = (1, 20, 100, 400)  # that a request may ask for
    seconds: float = 40.0


SHORT = Length(nodes=7, faults=4, requests=7, tokens=(1, 20, 80), seconds=15.0)
LONG = Length()


def make_story(seed: int, length: Length = LONG) -> Story:
    chance = random.Random(seed)
    layers = chance.randint(6, 16)
    nodes = chance.randint(5, length.nodes)
    memories = [chance.randint(max(2, layers // 4), layers) for _ in range(nodes)]
    while sum(memories) < 2 * layers:  # the loss of a few is bearable
        memories[chance.randrange(nodes)] = layers
    relays = chance.randint(1, 3)
    skewed = chance.random() < 0.3
    skews = [round(chance.uniform(-300, 300), 1) if skewed else 0.0 for _ in range(nodes)]
    names = [f"n{number}" for number in range(1, nodes + 1)]
    count = chance.randint(2, length.faults), chance.randint(4, length.requests)
    acts = [_fault(chance, names, relays, length) for _ in range(count[0])]
    acts += [_request(chance, names, length) for _ in range(count[1])]
    return Story(
        seed,
        layers,
        tuple(memories),
        tuple(skews),
        relays,
        chance.choice((0.0, 0.002, 0.02)),
        tuple(sorted(acts, key=lambda act: act.at_s)),
    )


def _fault(chance: random.Random, names: Sequence[str], relays: int, length: Length) -> Act:
    what = chance.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    at_s = round(BEGIN_S + chance.uniform(0, length.seconds), 2)
    for_s = round(chance.choice((0.5, 2.0, 8.0, 20.0)) * chance.uniform(0.5, 1.5), 2)
    match what:
        case "partition":
            some = chance.sample(list(names), chance.randint(1, len(names) // 2))
            return Act(at_s, what, tuple(sorted(some)), for_s)
        case "relay down":
            return Act(at_s, what, (), for_s, chance.randrange(relays))
        case "slow":
            return Act(at_s, what, (chance.choice(names),), for_s, chance.choice((3, 10, 100)))
        case "lie":
            return Act(at_s, what, (chance.choice(names),), for_s, lie=chance.choice(LIES))
        case _:
            return Act(at_s, what, (chance.choice(names),), for_s)


def _request(chance: random.Random, names: Sequence[str], length: Length) -> Act:
    at_s = round(BEGIN_S + chance.uniform(-2, length.seconds), 2)
    return Act(at_s, "ask", (chance.choice(names),), number=chance.choice(length.tokens))


def _prompt(tokens: int) -> tuple[int, ...]:
    """The same for all who ask for so many tokens: they share pages."""
    return tuple(range(tokens % 7, 20 + tokens % 50))


# ---- playing it


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the requests of a story ended, and the digest of all that happened."""

    whole: int
    asked: int
    digest: str


def play(story: Story) -> Outcome:
    """Raises Broken when a promise is not kept, and whatever a part of a node died of."""
    return run(lambda: _Stage(story).play(), limit_s=LIMIT_S)


class _Stage:
    def __init__(self, story: Story) -> None:
        self.story = story
        self.model = SimModel(
            "toy", (1_000_000,) * story.layers, kv_bytes=10, activation_bytes=4096
        )
        self.relays = [
            MemoryRelay(f"memory://{number}", jitter_s=story.jitter_s * 5, seed=number)
            for number in range(story.relays)
        ]
        self.off: set[str] = set()  # beyond a partition
        self.leaving: list[asyncio.Task[None]] = []
        # when somebody lied about the text itself, which is found out by other means; afterwards
        # nothing that it left in the caches of others may be met
        self.wrong_s = [
            (act.at_s, act.at_s + act.for_s)
            for act in story.acts
            if act.what == "lie" and act.lie == "wrong"
        ]

    async def play(self) -> Outcome:
        story = self.story
        network = MemoryNetwork(
            MemoryConfig(delay_s=0.001, jitter_s=story.jitter_s), seed=story.seed, weigh=more_bytes
        )
        async with World(
            [self.model], seed=story.seed, network=network, relays=self.relays
        ) as world:
            self.world = world
            for name in story.names:
                await self._join(name)
            for at_s, do in self._script():
                if at_s > world.now:
                    await world.sleep(at_s - world.now)
                await do()
            await self._judge()
            whole = sum(asked.outcome == "whole" for asked in world.asked)
            return Outcome(whole, len(world.asked), world.digest())

    def _script(self) -> list[tuple[float, Callable[[], Awaitable[None]]]]:
        """What is done when, beginnings and ends in one order."""
        script: list[tuple[float, int, Callable[[], Awaitable[None]]]] = []
        for order, act in enumerate(self.story.acts):
            script.append((act.at_s, order, partial(self._begin, act)))
            if act.for_s:
                script.append((act.at_s + act.for_s, order, partial(self._end, act)))
        return [(at_s, do) for at_s, _, do in sorted(script, key=lambda one: one[:2])]

    async def _join(self, name: str) -> None:
        if name in self.world.nodes:
            return
        at = self.story.names.index(name)
        speed = Speed(step_s=0.001, layer_s=0.0005, token_s=0.0001)
        machine = Machine(
            memory_bytes=(self.story.memories[at] * 1_050_000),
            speed=lambda model, layers: speed,
            models=(self.model,),
            load_bytes_per_s=1e7,
            reserve_tokens=2048,
        )
        await self.world.join(machine, name, number=at + 1, skew_s=self.story.skews_s[at])

    async def _begin(self, act: Act) -> None:
        world, name = self.world, act.names[0] if act.names else ""
        if name and name not in world.nodes and act.what != "partition":
            return
        match act.what:
            case "ask":
                world.request("toy", _prompt(act.number), act.number, gateway=name)
            case "kill" | "power off":
                await world.kill(name, silently=act.what == "power off")
            case "stop":
                world.stop(name)
            case "leave":
                self.leaving.append(asyncio.create_task(self._leave(act)))
            case "partition":
                self.off = {each for each in act.names if each in world.nodes}
                world.partition(
                    sorted(self.off), sorted(world.nodes.keys() - self.off), off_relays=self.off
                )
            case "relay down":
                self.relays[act.number].stop()
            case "slow":
                world.slow(name, act.number)
            case "lie":
                make_liar(world.nodes[name], act.lie, random.Random(self.story.seed))

    async def _leave(self, act: Act) -> None:
        """It takes its time, and longer where it is stopped; meanwhile other things happen."""
        (name,) = act.names
        await self.world.leave(name)
        await asyncio.sleep(max(0.0, act.at_s + act.for_s - self.world.now))
        await self._join(name)

    async def _end(self, act: Act) -> None:
        world, name = self.world, act.names[0] if act.names else ""
        match act.what:
            case "kill" | "power off":
                await self._join(name)
            case "stop" if name in world.nodes:
                world.resume(name)
            case "partition":
                self.off = set()
                world.heal()
            case "relay down":
                self.relays[act.number].start()
            case "slow" if name in world.nodes:
                world.slow(name, 1)
            case "lie" if name in world.nodes:  # caught: it begins anew
                await world.kill(name)
                await self._join(name)

    # ---- what must hold

    async def _judge(self) -> None:
        world = self.world
        for name in self.story.names:
            if name in world.nodes:
                world.resume(name)
        for leaving in self.leaving:
            await leaving
        for name in self.story.names:
            await self._join(name)
        await self._until(COVERED_S, "the model is covered", lambda: world.is_served("toy"))
        await self._until(
            ANSWERED_S, "every request has ended", lambda: all(a.done.is_set() for a in world.asked)
        )
        for asked in world.asked:
            self._judge_answer(asked)
        await world.sleep(SETTLED_S)
        for name in self.story.names:
            asked = await world.ask("toy", _prompt(1), 8, gateway=name)
            if asked.outcome != "whole":
                raise self._broken(f"{name} does not answer when all is well: {asked.error}")
            self._judge_answer(asked)
        await self._until(FREE_S, "everything is free", lambda: not list(self._held()))

    def _judge_answer(self, asked: Asked) -> None:
        doubtful = any(asked.at_s < end and begin < asked.done_s for begin, end in self.wrong_s)
        if not doubtful and not asked.is_right:
            raise self._broken(f"another text at {asked.gateway}: {asked.tokens[:20]}")
        if asked.outcome == "whole" and len(asked.tokens) != asked.max_tokens:
            raise self._broken(f"{len(asked.tokens)} of {asked.max_tokens} tokens are called whole")

    def _held(self) -> Iterator[str]:
        """What is not free."""
        for node in self.world.nodes.values():
            if len(node.pipeline.gateway):
                yield f"{node.name} has {len(node.pipeline.gateway)} generations"
            for worker in node.pipeline.workers:
                if len(worker.sessions) or worker.sessions.pool.used_fraction:
                    used = worker.sessions.pool.used_fraction
                    yield f"{node.name} has {len(worker.sessions)} sessions, {used:.2f} of pages"

    async def _until(self, limit_s: float, what: str, holds: Callable[[], bool]) -> None:
        try:
            await self.world.until(holds, limit_s=limit_s)
        except TimeoutError:
            raise self._broken(f"not within {limit_s:g} s: {what}") from None

    def _broken(self, what: str) -> Broken:
        kept = "; ".join(self._held())
        holdings = ((node.name, node.held()) for node in self.world.nodes.values())
        served = ", ".join(f"{name} {held.layers if held else '-'}" for name, held in holdings)
        return Broken(f"{what}\nheld: {kept}\nserved: {served}\n{self.story}")
