"""Through whom no session is planned: what we saw ourselves, and nobody's word alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, cast

from shoal.bus.membership import Membership
from shoal.errors import LinkClosed
from shoal.node.neighbours import Neighbours
from shoal.sim.loop import run
from shoal.sim.machine import Machine
from shoal.sim.model import SimModel
from shoal.sim.world import World
from shoal.transport import Links
from shoal.units import NodeId

AMBER, BIRCH = NodeId("amber"), NodeId("birch")


class Said:
    """What membership knows of doubts."""

    def __init__(self) -> None:
        self.doubts: set[NodeId] = set()
        self.reached: list[NodeId] = []

    def doubtful(self) -> frozenset[NodeId]:
        return frozenset(self.doubts)

    def suspect(self, node: NodeId) -> None:
        self.doubts.add(node)

    def found(self, node: NodeId) -> None:
        self.reached.append(node)


class Wires:
    def __init__(self) -> None:
        self.dead: set[NodeId] = set()
        self.parted: list[NodeId] = []
        self.lose: Callable[[NodeId, str], None]

    def on_lost(self, call: Callable[[NodeId, str], None]) -> None:
        self.lose = call

    async def connect(self, node: NodeId) -> None:
        if node in self.dead:
            raise LinkClosed("nobody answers")

    def part(self, node: NodeId) -> None:
        self.parted.append(node)


def test_who_does_not_answer_our_call_is_left_out_until_it_announces_itself() -> None:
    async def scenario() -> None:
        said, wires, tasks = Said(), Wires(), list[asyncio.Task[None]]()

        def start(work: Coroutine[Any, Any, None]) -> None:
            tasks.append(asyncio.ensure_future(work))

        found = Neighbours(private=False, start=start)
        found.meet(cast(Membership, said), cast(Links, wires))
        said.doubts.add(BIRCH)  # somebody says so
        assert found.doubtful() == frozenset()
        wires.dead.add(AMBER)
        wires.lose(AMBER, "silent")
        assert found.doubtful() == {AMBER}  # while we call it back
        await asyncio.gather(*tasks)
        assert found.doubtful() == {AMBER}
        said.doubts.discard(AMBER)  # it announced itself
        assert found.doubtful() == frozenset()

    asyncio.run(scenario())


def test_who_answers_our_call_is_asked_again() -> None:
    async def scenario() -> None:
        said, wires, tasks = Said(), Wires(), list[asyncio.Task[None]]()
        found = Neighbours(
            private=False, start=lambda work: tasks.append(asyncio.ensure_future(work))
        )
        found.meet(cast(Membership, said), cast(Links, wires))
        wires.lose(AMBER, "busy")
        await asyncio.gather(*tasks)
        assert found.doubtful() == frozenset()

    asyncio.run(scenario())


def test_a_check_that_succeeds_leaves_no_link_behind() -> None:
    async def scenario() -> None:
        said, wires, tasks = Said(), Wires(), list[asyncio.Task[None]]()
        found = Neighbours(
            private=False, start=lambda work: tasks.append(asyncio.ensure_future(work))
        )
        found.meet(cast(Membership, said), cast(Links, wires))
        wires.dead.add(BIRCH)
        found.check(AMBER)
        found.check(BIRCH)
        await asyncio.gather(*tasks)
        assert (said.reached, wires.parted) == ([AMBER], [AMBER])
        assert said.doubts == {BIRCH}

    asyncio.run(scenario())


# ---- in a mesh of twins

TOY = SimModel("toy", (1_000_000,) * 4, kv_bytes=100, activation_bytes=64)
MACHINE = Machine(memory_bytes=6_000_000, models=(TOY,), load_bytes_per_s=1e9)


def together(scenario: Callable[[World], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        async with World([TOY], seed=1) as world:
            for _ in range(3):
                await world.join(MACHINE)
            await world.until(lambda: world.is_served("toy"))
            await world.sleep(2)
            await scenario(world)

    run(main)


def test_neighbours_know_each_others_addresses_names_and_stages() -> None:
    async def scenario(world: World) -> None:
        one, other = world.nodes["node-1"], world.nodes["node-2"]
        contact = one.neighbours.contact(other.id)
        assert contact is not None
        assert contact.transport_key == other.identity.card.transport_key
        assert one.neighbours.contact(NodeId("a stranger")) is None
        assert one.neighbours.name(other.id) == "node-2"
        assert one.neighbours.name(NodeId("a stranger")) == "a stranger"
        assert {node for node, _ in one.neighbours.offers()} == set(world.ids(["node-2", "node-3"]))

    together(scenario)


def test_a_public_mesh_lets_strangers_knock_and_a_private_one_does_not() -> None:
    async def scenario(world: World) -> None:
        node = world.nodes["node-1"]
        private = Neighbours(private=True, start=node.start_task)
        private.meet(node.membership, node.links)
        assert node.neighbours.admits(NodeId("a stranger"))
        assert not private.admits(NodeId("a stranger"))
        assert private.admits(world.nodes["node-2"].id)

    together(scenario)


def test_who_fell_silent_is_left_out_and_who_comes_back_is_asked_again() -> None:
    async def scenario(world: World) -> None:
        node, other = world.nodes["node-1"], world.nodes["node-2"]
        await node.links.connect(other.id)
        world.stop("node-2")
        await world.until(lambda: other.id in node.neighbours.doubtful(), limit_s=10)
        world.resume("node-2")
        await world.until(lambda: other.id not in node.neighbours.doubtful(), limit_s=60)

    together(scenario)


def test_a_node_that_was_only_slandered_is_no_doubt_of_ours() -> None:
    async def scenario(world: World) -> None:
        node, other = world.nodes["node-1"], world.nodes["node-2"]
        node.neighbours.check(other.id)
        await world.sleep(5)
        assert not node.links.is_connected(other.id)  # nobody needs it
        assert other.id not in node.neighbours.doubtful()

    together(scenario)
