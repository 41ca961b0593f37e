"""Half of the nodes lost within an hour, others coming, and requests all the while: what is lost?

The nodes are those of the simulator: real membership, links, pipeline, placement and routing over
links and engines in virtual time, whose every token is checked. Nodes die without a word at random
times, half of them with their machine, whose connections then stay silent. An answer that breaks
off counts as avoidable when those who lived held all layers when it ended, or shortly before.

    python bench/churn.py --quick
    python bench/churn.py --json churn.json
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from contract import Bench, percentile

from shoal.events import Recovered
from shoal.hardware import Speed
from shoal.placement.coverage import covered
from shoal.sim.asked import Asked
from shoal.sim.loop import run
from shoal.sim.machine import Machine
from shoal.sim.model import SimModel
from shoal.sim.world import World
from shoal.transport.memory import MemoryNetwork, Path

NODES = 16
JOINS = NODES // 4
LAYERS, LAYER_BYTES, KV_BYTES = 24, 1 << 20, 256
MOST_LAYERS = 8  # of a node
KV_TOKENS = 8192
SPEED = Speed(step_s=0.001, layer_s=0.001, token_s=1e-5)
RETRY_S = 1.5  # so long a gateway looks for another route
WATCH_S = 0.1
PROMPT, ANSWER = 64, 80
GATEWAY = "gateway"


@dataclass
class Churned:
    """One run: when all layers were held, and what became of the requests."""

    asked: list[Asked]
    held: list[tuple[float, bool]]
    kills: int = 0
    joins: int = 0
    gaps_s: list[float] = field(default_factory=list)  # of answers that were mended

    def lost(self) -> list[Asked]:
        return [one for one in self.asked if one.outcome not in ("whole", "running")]

    def avoidable(self) -> list[Asked]:
        return [one for one in self.lost() if self._was_held(one)]

    def _was_held(self, one: Asked) -> bool:
        """At some time that its gateway looked for a route in before it gave up."""
        since = max(one.at_s, one.done_s - RETRY_S)
        return any(held for when, held in self.held if since <= when <= one.done_s)


def machine() -> Machine:
    room = MOST_LAYERS * (LAYER_BYTES + KV_TOKENS * KV_BYTES) + (LAYER_BYTES >> 1)
    return Machine(
        memory_bytes=room,
        models=(model(),),
        speed=lambda of, layers: SPEED,
        reserve_tokens=KV_TOKENS,
        load_bytes_per_s=LAYER_BYTES * MOST_LAYERS / 10,  # ten seconds
        gateway=False,
    )


def model() -> SimModel:
    return SimModel("toy", (LAYER_BYTES,) * LAYERS, KV_BYTES, 8192)


async def churn(seed: int, seconds: float, every_s: float) -> Churned:
    chance = random.Random(seed)
    path = Path(delay_s=0.005, jitter_s=0.001, bytes_per_s=1e8)
    network = MemoryNetwork(seed=seed, paths=lambda a, b: path)
    async with World([model()], seed=seed, network=network) as world:
        await world.join(Machine(memory_bytes=0), GATEWAY)
        for n in range(NODES):
            await world.join(machine(), f"first-{n}")
        await world.until(lambda: world.is_served("toy"))
        await asyncio.sleep(60)
        return await _through(world, chance, seconds, every_s)


async def _through(world: World, chance: random.Random, seconds: float, every_s: float) -> Churned:
    result = Churned(world.asked, [])
    watching = asyncio.ensure_future(_watch(world, result))
    asking = asyncio.ensure_future(_ask(world, chance, every_s))
    began = world.now
    what = [True] * (NODES // 2) + [False] * JOINS
    times = sorted((chance.uniform(0, seconds), at, kill) for at, kill in enumerate(what))
    for at_s, _, kill in times:
        await asyncio.sleep(max(0.0, began + at_s - world.now))
        await (_kill(world, chance, result) if kill else _join(world, result))
    await asyncio.sleep(max(0.0, began + seconds - world.now))
    asking.cancel()
    await asyncio.wait_for(asyncio.gather(*(one.done.wait() for one in world.asked)), 600)
    watching.cancel()
    result.gaps_s = [what.seconds for _, _, what in world.log if isinstance(what, Recovered)]
    return result


async def _kill(world: World, chance: random.Random, result: Churned) -> None:
    name = chance.choice(sorted(set(world.nodes) - {GATEWAY}))
    result.kills += 1
    await world.kill(name, silently=chance.random() < 0.5)


async def _join(world: World, result: Churned) -> None:
    result.joins += 1
    await world.join(machine(), f"late-{result.joins}")


async def _ask(world: World, chance: random.Random, every_s: float) -> None:
    while True:
        await asyncio.sleep(chance.expovariate(1 / every_s))
        prompt = [chance.randrange(1000) for _ in range(PROMPT)]
        world.request("toy", prompt, ANSWER, gateway=GATEWAY)


async def _watch(world: World, result: Churned) -> None:
    while True:
        parts = [
            served.layers
            for node in world.nodes.values()
            for served in node.serving.slices
            if served.state == "serving"
        ]
        result.held.append((world.now, covered(LAYERS, parts)))
        await asyncio.sleep(WATCH_S)


def report(bench: Bench, seeds: Sequence[int], seconds: float, every_s: float) -> None:
    avoidable = wrong = 0
    for seed in seeds:
        result: Churned = run(partial(churn, seed, seconds, every_s), limit_s=1e6)
        bench.row(what=f"seed {seed}", **figures(result))
        avoidable += len(result.avoidable())
        wrong += sum(not one.is_right for one in result.asked)
    bench.aim("lost although all layers were held", "== 0", got=avoidable, holds=avoidable == 0)
    bench.aim("texts with a token missing, doubled or wrong", "== 0", got=wrong, holds=wrong == 0)


def figures(result: Churned) -> dict[str, Any]:
    held = sum(held for _, held in result.held) / max(1, len(result.held))
    gaps = result.gaps_s
    return {
        "requests": len(result.asked),
        "kills": result.kills,
        "joins": result.joins,
        "mended": len(gaps),
        "gap_p50_s": percentile(gaps, 50) if gaps else None,
        "gap_p95_s": percentile(gaps, 95) if gaps else None,
        "lost": len(result.lost()),
        "avoidable": len(result.avoidable()),
        "held_share": held,
    }


def main() -> None:
    bench = Bench("churn", __doc__)
    if bench.quick:
        report(bench, (1,), seconds=200.0, every_s=2.0)
    else:
        report(bench, (1, 2, 3), seconds=3600.0, every_s=3.0)
    bench.finish()


if __name__ == "__main__":
    main()
