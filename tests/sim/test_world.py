"""A small mesh in virtual time."""

from __future__ import annotations

from shoal.hardware import Speed
from shoal.sim.loop import run
from shoal.sim.model import SimModel
from shoal.sim.node import Machine
from shoal.sim.world import Asked, World

TOY = SimModel("toy", (1_000_000,) * 12, kv_bytes=100, activation_bytes=4096)
SPEED = Speed(step_s=0.001, layer_s=0.002, token_s=0.0001)
SMALL = Machine(
    memory_bytes=6_000_000, speed=lambda model, layers: SPEED, models=(TOY,), load_bytes_per_s=1e7
)


def test_three_nodes_share_a_model_and_give_its_text() -> None:
    async def main() -> Asked:
        async with World([TOY], seed=1) as world:
            for _ in range(3):
                await world.join(SMALL)
            await world.until(lambda: world.is_served("toy"), limit_s=60)
            return await world.ask("toy", range(40), 20, gateway="node-3")

    asked = run(main, limit_s=1000)
    assert asked.error is None
    assert asked.tokens == TOY.expected(range(40), 20)
    assert asked.came_s[-1] - asked.came_s[0] > 19 * 12 * 0.002
