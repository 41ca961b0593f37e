"""Narrow links: who generates does not wait for others' prompts on the way."""

from __future__ import annotations

from dataclasses import replace

from shoal.hardware import Speed
from shoal.sim.engine import more_bytes
from shoal.sim.loop import run
from shoal.sim.machine import Machine
from shoal.sim.model import SimModel
from shoal.sim.world import World
from shoal.transport import MemoryConfig, MemoryNetwork
from shoal.units import Slice

TOY = SimModel("toy", (1_000_000,) * 8, kv_bytes=10, activation_bytes=16384)
SPEED = Speed(step_s=0.001, layer_s=0.001, token_s=0.000001)
MACHINE = Machine(memory_bytes=9_000_000, speed=lambda model, layers: SPEED, models=(TOY,))
NARROW = MemoryConfig(bytes_per_s=4e6, window_bytes=128 << 10)  # 2 s for a prompt of 512 tokens


def test_a_stream_goes_on_while_long_prompts_cross_its_narrow_link() -> None:
    async def main() -> World:
        network = MemoryNetwork(NARROW, weigh=more_bytes)
        async with World([TOY], seed=1, network=network) as world:
            for part in (Slice(0, 4), Slice(4, 8)):
                await world.join(replace(MACHINE, pinned=part))
            await world.until(lambda: world.is_served("toy"), limit_s=120)
            reading = world.request("toy", range(8), 400, gateway="node-1")
            await world.until(lambda: len(reading.tokens) > 10)
            others = [
                world.request("toy", range(at, at + 1000), 2, gateway="node-1")
                for at in (1000, 3000, 5000)
            ]
            for asked in (reading, *others):
                await asked.done.wait()
                assert asked.outcome == "whole"
                assert asked.is_right
            assert others[-1].came_s[0] - others[-1].at_s > 8, "the prompts took their time"
            gaps = [b - a for a, b in zip(reading.came_s, reading.came_s[1:], strict=False)]
            assert max(gaps) < 0.25
        return world

    run(main, limit_s=10_000)
