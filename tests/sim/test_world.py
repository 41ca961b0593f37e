"""A small mesh in virtual time."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import pytest

from shoal.events import RequestDone, StageChanged
from shoal.hardware import Speed
from shoal.sim.loop import run
from shoal.sim.machine import Machine
from shoal.sim.model import SimModel
from shoal.sim.world import World
from shoal.units import SessionId, Slice

TOY = SimModel("toy", (1_000_000,) * 12, kv_bytes=100, activation_bytes=4096)
SPEED = Speed(step_s=0.001, layer_s=0.002, token_s=0.0001)
SMALL = Machine(
    memory_bytes=6_000_000, speed=lambda model, layers: SPEED, models=(TOY,), load_bytes_per_s=1e7
)
PROMPT, SESSION = tuple(range(40)), SessionId("s")
TWICE = (Slice(0, 4), Slice(4, 8), Slice(8, 12))  # by six nodes


def within(
    scenario: Callable[[World], Awaitable[None]],
    *,
    nodes: int = 3,
    seed: int = 1,
    pinned: Sequence[Slice | None] = (None,),
) -> World:
    """So many nodes that serve the toy, their slices chosen or pinned, and what is done to them."""

    async def main() -> World:
        async with World([TOY], seed=seed) as world:
            for number in range(nodes):
                await world.join(replace(SMALL, pinned=pinned[number % len(pinned)]))
            await world.until(lambda: world.is_served("toy"), limit_s=120)
            await scenario(world)
        return world

    return run(main, limit_s=10_000)


def test_three_nodes_share_a_model_and_give_its_text() -> None:
    async def scenario(world: World) -> None:
        asked = await world.ask("toy", PROMPT, 20, gateway="node-3")
        assert asked.outcome == "whole"
        assert asked.tokens == TOY.expected(PROMPT, 20)
        assert asked.came_s[-1] - asked.came_s[0] > 19 * 12 * 0.002

    within(scenario)


def test_many_sessions_at_once_all_get_their_own_text() -> None:
    async def scenario(world: World) -> None:
        all_of_them = [
            world.request("toy", range(start, start + 30), 15, gateway=f"node-{1 + start % 3}")
            for start in range(24)
        ]
        for asked in all_of_them:
            await asked.done.wait()
            assert asked.outcome == "whole"
            assert asked.is_right

    within(scenario)


def test_a_killed_stage_does_not_cost_the_answer() -> None:
    async def scenario(world: World) -> None:
        await world.until(lambda: all(node.held() for node in world.nodes.values()))
        asked = world.request("toy", PROMPT, 200, gateway="node-1")
        await world.until(lambda: len(asked.tokens) > 20)
        await world.kill("node-2")
        await asked.done.wait()
        assert asked.outcome == "whole", asked.error
        assert asked.is_right

    within(scenario, nodes=6, pinned=TWICE)


@pytest.mark.parametrize("silently", [False, True])
def test_a_stream_waits_for_who_moves_into_the_place_of_the_dead(silently: bool) -> None:
    """Nobody else holds its layers, and those that are left must all move to make up for them."""

    async def scenario(world: World) -> None:
        await world.sleep(60)
        asked = world.request("toy", PROMPT, 100, gateway="node-1")
        await world.until(lambda: len(asked.tokens) > 20)
        await world.kill("node-4", silently=silently)
        assert not world.is_served("toy") or silently
        await asked.done.wait()
        assert asked.outcome == "whole", asked.error
        assert asked.is_right

    within(scenario, nodes=4)


def test_where_nobody_can_move_the_client_is_told_soon() -> None:
    async def scenario(world: World) -> None:
        asked = world.request("toy", PROMPT, 500, gateway="node-1")
        await world.until(lambda: len(asked.tokens) > 5)
        await world.kill("node-2")
        killed_at = world.now
        await asked.done.wait()
        assert asked.outcome == "lost"
        assert world.now - killed_at < 3

    within(scenario, pinned=TWICE)


def test_nodes_change_over_to_the_model_that_is_asked_for_and_leave_the_other_whole() -> None:
    short = replace(TOY, layer_bytes=TOY.layer_bytes[:4])
    models = {"toy": short, "other": replace(short, name="other")}
    slow = Speed(step_s=0.001, layer_s=0.05, token_s=0.02)
    machine = replace(SMALL, models=tuple(models.values()), speed=lambda model, layers: slow)

    def holders(world: World, name: str) -> int:
        held = [node.held() for node in world.nodes.values()]
        return sum(one is not None and one.model == models[name].model_id for one in held)

    async def main() -> None:
        async with World(list(models.values()), seed=1) as world:
            for _ in range(6):
                await world.join(machine)
            await world.until(lambda: world.is_served("toy") and world.is_served("other"))
            await world.sleep(60)
            wanted, spared = sorted(models, key=lambda name: holders(world, name))
            before = holders(world, wanted)
            for _ in range(90):  # clients ask for far more of it than there is
                world.nodes["node-1"].emit(RequestDone(SESSION, wanted, "length", 1000, 1.0))
                await world.sleep(1)
                assert world.is_served(spared)
            assert holders(world, wanted) > before
            moved = [what for _, _, what in world.log if isinstance(what, StageChanged)]
            assert sum(what.state == "draining" for what in moved) < 20, "nodes flap"
            for name, model in models.items():
                asked = await world.ask(name, PROMPT, 10, gateway="node-2")
                assert asked.tokens == model.expected(PROMPT, 10)

    run(main, limit_s=10_000)


def test_the_clients_of_a_dead_gateway_are_told() -> None:
    async def scenario(world: World) -> None:
        asked = world.request("toy", PROMPT, 500, gateway="node-1")
        await world.until(lambda: len(asked.tokens) > 5)
        await world.kill("node-1")
        assert asked.outcome == "gateway lost"

    within(scenario, nodes=6, pinned=TWICE)


def test_a_stopped_process_keeps_its_links_and_says_nothing() -> None:
    async def scenario(world: World) -> None:
        await world.until(lambda: all(node.held() for node in world.nodes.values()))
        world.stop("node-2")
        before = [entry for entry in world.log if entry[1] == "node-2"]
        await world.sleep(30)
        assert [entry for entry in world.log if entry[1] == "node-2"] == before
        world.resume("node-2")
        await world.sleep(30)
        assert world.nodes["node-2"].held()

    within(scenario, nodes=6, pinned=TWICE)


def test_who_leaves_says_goodbye() -> None:
    async def scenario(world: World) -> None:
        await world.leave("node-3")
        assert "node-3" not in world.nodes
        await world.sleep(1)
        views = [node.membership.view for node in world.nodes.values()]
        assert all(len(view) == 4 for view in views)

    within(scenario, nodes=6, pinned=TWICE)


def test_a_bug_in_a_node_ends_the_world_with_it() -> None:
    async def scenario(world: World) -> None:
        async def breaks() -> None:
            raise ZeroDivisionError

        world.nodes["node-1"].start_task(breaks())
        await world.sleep(1)

    with pytest.raises(ZeroDivisionError):
        within(scenario)


def test_a_node_that_has_no_files_only_asks() -> None:
    async def scenario(world: World) -> None:
        await world.join(replace(SMALL, models=()), "asker")
        await world.until(lambda: world.is_served("toy"), limit_s=60)
        asked = await world.ask("toy", PROMPT, 5, gateway="asker")
        assert asked.is_right
        assert len(asked.tokens) == 5

    within(scenario)


def an_eventful_run(seed: int) -> World:
    return within(eventful, nodes=7, pinned=TWICE, seed=seed)


async def eventful(world: World) -> None:
    for start in range(8):
        world.request("toy", range(start, start + 30), 40, gateway="node-1")
    await world.sleep(0.7)
    await world.kill("node-2")
    world.stop("node-3")
    await world.sleep(4)
    world.resume("node-3")
    world.partition(["node-1", "node-4"], ["node-5", "node-6"])
    await world.sleep(5)
    world.heal()
    for asked in world.asked:
        await asked.done.wait()


def test_the_same_seed_gives_the_same_run_in_another_process() -> None:
    def digest(hash_seed: str) -> str:
        code = "from tests.sim.test_world import *\nprint(an_eventful_run(1).digest())"
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert digest("1") == digest("2")


def test_another_seed_gives_another_run() -> None:
    assert an_eventful_run(1).digest() != an_eventful_run(2).digest()
