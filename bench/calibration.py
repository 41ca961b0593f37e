"""What the simulator foretells against what a real mesh does: tokens/s and time to first token.

Three `shoal up` processes on loopback hold a third of a model each. What each of them has learnt of
its own steps is read from its API and given to the simulator's machines, with the same slices; then
both meshes get the same requests, alone and several at once. Nothing else is fitted: what the
simulator leaves out (the API, the client, cores that processes share) is in the difference.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from contract import Bench
from live import complete, mesh, write_model
from shapes import SHAPES

from shoal.hardware import Speed
from shoal.sim.asked import Asked
from shoal.sim.loop import run
from shoal.sim.machine import Machine
from shoal.sim.model import SimModel
from shoal.sim.world import World
from shoal.transport.memory import MemoryNetwork
from shoal.transport.memory import Path as LinkPath
from shoal.units import Slice

MODEL, CUT = "SmolLM2-135M", ("0:12", "12:23", "23:30")
LOOPBACK_S = 0.0001  # one way
PROMPT = list(range(3, 259))
TOKENS = 64
LEARNING = 4  # answers before anything is measured: stages get to know their own pace
HIDDEN_BYTES = 2 * 576
KV_BYTES = 2 * 2 * 3 * 64
NEAR = 1.25  # so close should prediction and measurement be


@dataclass(frozen=True)
class Answers:
    """Of requests sent at the same time."""

    first_s: float  # to the first token, in the median
    token_s: float  # between two tokens
    tokens_per_s: float  # all together, from the first token of all to the last

    @classmethod
    def of(cls, first_s: Sequence[float], came: Sequence[Sequence[float]]) -> Answers:
        gaps = [b - a for times in came for a, b in pairwise(times)]
        seconds = max(times[-1] for times in came) - min(times[0] for times in came)
        count = sum(len(times) - 1 for times in came)
        return cls(statistics.median(first_s), statistics.median(gaps), count / seconds)


# ---- the real mesh


def measured(api: str, beside: int, rounds: int) -> Answers:
    """The median of some rounds."""
    with ThreadPoolExecutor(beside) as pool:
        found = [
            Answers.of(*zip(*pool.map(lambda _: _one(api), range(beside)), strict=True))
            for _ in range(rounds)
        ]
    return sorted(found, key=lambda each: each.tokens_per_s)[len(found) // 2]


def _one(api: str) -> tuple[float, list[float]]:
    """No two prompts begin alike, or the second finds its pages."""
    return complete(api, MODEL, [1000 + next(_asked), *PROMPT[1:]], TOKENS)


_asked = itertools.count()


def speeds(api: str) -> dict[Slice, Speed]:
    """What each stage announces of itself."""
    with urlopen(f"{api}/v1/mesh") as answer:  # noqa: S310 - our own node
        nodes: list[dict[str, Any]] = json.load(answer)["nodes"]
    return {
        Slice.parse(stage["layers"]): Speed(**stage["speed"])
        for node in nodes
        for stage in node["stages"]
    }


# ---- the simulated one


def foretold(known: Mapping[Slice, Speed], beside: int) -> Answers:
    asked: list[Asked] = run(lambda: _simulated(known, beside), limit_s=1e5)
    first = [each.first_s for each in asked if each.first_s is not None]
    return Answers.of(first, [each.came_s for each in asked])


async def _simulated(known: Mapping[Slice, Speed], beside: int) -> list[Asked]:
    layers = max(part.stop for part in known)
    model = SimModel(MODEL, (1 << 20,) * layers, KV_BYTES, HIDDEN_BYTES)
    network = MemoryNetwork(paths=lambda a, b: LinkPath(delay_s=LOOPBACK_S))
    async with World([model], network=network) as world:
        for number, part in enumerate(sorted(known)):
            machine = Machine(
                memory_bytes=1 << 30,
                models=(model,),
                pinned=part,
                speed=lambda of, layers: known[layers],
                exact=False,
            )
            await world.join(machine, f"node{number}")
        await world.until(lambda: world.is_served(MODEL))
        await asyncio.sleep(5)
        await world.ask(MODEL, [1, *PROMPT[1:]], 2, gateway="node0")  # links are made once
        sent = [
            world.request(MODEL, [2 + at, *PROMPT[1:]], TOKENS, gateway="node0")
            for at in range(beside)
        ]
        for each in sent:
            await each.done.wait()
        return sent


# ---- both


def compare(bench: Bench, api: str, beside: int, rounds: int) -> None:
    real = measured(api, beside, rounds)
    known = speeds(api)
    simulated = foretold(known, beside)
    for name, each in (("measured", real), ("simulated", simulated)):
        bench.row(
            what=f"{beside} at once, {name}",
            tokens_per_s=each.tokens_per_s,
            token_ms=1e3 * each.token_s,
            first_ms=1e3 * each.first_s,
        )
    for what, ratio in (
        ("tokens/s", simulated.tokens_per_s / real.tokens_per_s),
        ("time to first token", simulated.first_s / real.first_s),
    ):
        close = 1 / NEAR <= ratio <= NEAR
        bench.aim(
            f"{beside} at once: {what}, simulated / measured", "0.8 .. 1.25", got=ratio, holds=close
        )


def main() -> None:
    bench = Bench("calibration", __doc__)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / MODEL, SHAPES[MODEL])
        how = ("--quant", "int8", "--draft", "none")
        with mesh(folder / "mesh", folder / MODEL, CUT, *how) as api:
            for _ in range(LEARNING):
                _one(api)
            for beside in (1,) if bench.quick else (1, 2, 4):
                compare(bench, api, beside, rounds=3 if bench.quick else 9)
    bench.finish()


if __name__ == "__main__":
    main()
