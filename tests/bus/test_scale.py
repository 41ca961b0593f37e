"""Whole meshes in memory and in virtual time: who hears what, and what faults do to it."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from shoal.bus.announcement import Announcement
from shoal.bus.cells import CellsConfig
from shoal.bus.membership import Membership, MembershipConfig
from shoal.bus.memory import MemoryBus
from shoal.bus.memory_relay import MemoryRelay
from shoal.events import ClockSkewed, Event, NodeGone
from shoal.identity import Identity
from shoal.sim.loop import run
from shoal.units import NodeId

from .nodes import CAPABILITY, CLUB, STAGE

EPOCH_S = 1_800_000_000.0


class Members:
    """Nodes that meet at relays in memory; time is the loop's."""

    def __init__(self, stack: AsyncExitStack, relays: list[MemoryRelay], seed: int = 0) -> None:
        self.relays, self.stack, self.chance = relays, stack, random.Random(seed)
        self.members: list[Membership] = []
        self.identities: list[Identity] = []
        self.buses: list[MemoryBus] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.events: list[tuple[int, Event]] = []
        self.stage = STAGE  # that all of them announce

    async def join(self, skew_s: float = 0.0, config: MembershipConfig | None = None) -> Membership:
        number = len(self.members)
        who = Identity.from_secret(hashlib.sha256(b"member %d" % number).digest())
        loop = asyncio.get_running_loop()

        def wall_clock() -> float:
            return EPOCH_S + skew_s + loop.time()

        def emit(event: Event) -> None:
            self.events.append((number, event))

        bus = MemoryBus(who, CLUB, self.relays, clock=wall_clock)
        member = Membership(
            bus,
            who,
            lambda sequence: self.describe(who, sequence),
            emit=emit,
            clock=loop.time,
            wall_clock=wall_clock,
            chance=random.Random(number),
            config=config,
        )
        await self.stack.enter_async_context(bus)
        self.identities.append(who)
        self.members.append(member)
        self.buses.append(bus)
        self.tasks.append(asyncio.create_task(member.run()))
        self.stack.push_async_callback(asyncio.wait, {self.tasks[-1]})
        self.stack.callback(self.tasks[-1].cancel)
        return member

    def describe(self, who: Identity, sequence: int) -> Announcement:
        return Announcement(
            card=who.card,
            name=who.name,
            addresses=("192.168.1.4:7472",),
            capability=CAPABILITY,
            stages=(self.stage,),
            gateway=True,
            software="shoal",
            sequence=sequence,
            sent_at=0,
        )

    def node(self, number: int) -> NodeId:
        return self.identities[number].node

    async def kill(self, number: int) -> None:
        """Without a goodbye."""
        self.tasks[number].cancel()
        await asyncio.wait({self.tasks[number]})
        for relay in self.relays:
            relay.cut(self.node(number))

    def complete(self, living: list[int]) -> bool:
        """Does each of them see exactly the others?"""
        nodes = {self.node(number) for number in living}
        return all(
            set(self.members[number].view.nodes) == nodes - {self.node(number)} for number in living
        )


def in_virtual_time(
    main: Callable[[Members], Coroutine[Any, Any, None]], *relays: MemoryRelay, seed: int = 0
) -> None:
    async def world() -> None:
        async with AsyncExitStack() as stack:
            await main(Members(stack, list(relays), seed))

    run(world, limit_s=100_000.0)


def test_a_dead_node_is_gone_within_seconds_once_a_neighbour_lost_it() -> None:
    async def world(mesh: Members) -> None:
        for _ in range(12):
            member = await mesh.join()
            member.on_doubt = member.suspect  # whoever checks finds it dead
        await asyncio.sleep(5.0)
        await mesh.kill(0)
        mesh.members[1].suspect(mesh.node(0))
        await asyncio.sleep(0.5)
        assert all(mesh.members[n].doubtful() == {mesh.node(0)} for n in range(1, 12))
        await asyncio.sleep(6.0)
        assert mesh.complete(list(range(1, 12)))

    in_virtual_time(world, MemoryRelay(delay_s=0.05))


def test_a_node_that_one_cannot_reach_but_others_can_stays() -> None:
    async def world(mesh: Members) -> None:
        for _ in range(12):
            await mesh.join()
        await asyncio.sleep(5.0)
        mesh.members[1].suspect(mesh.node(0))
        await asyncio.sleep(30.0)
        assert mesh.complete(list(range(12)))
        assert not any(isinstance(event, NodeGone) for _, event in mesh.events)
        assert not any(member.doubtful() for member in mesh.members)

    in_virtual_time(world, MemoryRelay(delay_s=0.05))


def test_nodes_on_the_two_sides_of_a_partition_lose_and_find_each_other() -> None:
    async def world(mesh: Members) -> None:
        left, right = mesh.relays
        for _ in range(10):
            await mesh.join()
        await asyncio.sleep(5.0)
        assert mesh.complete(list(range(10)))
        left.cut(*map(mesh.node, range(5)))
        right.cut(*map(mesh.node, range(5, 10)))
        await asyncio.sleep(200.0)
        assert mesh.complete(list(range(5)))
        assert mesh.complete(list(range(5, 10)))
        left.heal()
        right.heal()
        await asyncio.sleep(1.0)
        assert mesh.complete(list(range(10)))

    in_virtual_time(world, MemoryRelay("memory://left"), MemoryRelay("memory://right"))


def test_while_no_relay_is_up_nobody_is_forgotten_and_afterwards_only_the_dead_are() -> None:
    async def world(mesh: Members) -> None:
        for _ in range(8):
            await mesh.join()
        await asyncio.sleep(5.0)
        mesh.relays[0].stop()
        await asyncio.sleep(100.0)
        await mesh.kill(7)
        await asyncio.sleep(400.0)
        assert all(len(mesh.members[n].view) == 7 for n in range(7))
        mesh.relays[0].start()
        await asyncio.sleep(120.0)
        assert mesh.complete(list(range(7)))

    in_virtual_time(world, MemoryRelay(delay_s=0.05))


def test_a_node_that_we_have_a_link_with_is_not_gone_whatever_the_others_say() -> None:
    async def world(mesh: Members) -> None:
        for _ in range(6):
            await mesh.join()
        await asyncio.sleep(5.0)
        victim = mesh.node(0)
        mesh.members[1].is_linked = lambda node: node == victim
        mesh.relays[0].cut(victim)  # it cannot refute
        for number in range(1, 5):
            mesh.members[number].suspect(victim)
        await asyncio.sleep(300.0)
        assert [victim in member.view.nodes for member in mesh.members[1:]] == [True] + [False] * 4
        assert not mesh.members[1].doubtful()

    in_virtual_time(world, MemoryRelay(delay_s=0.05))


def test_load_is_told_when_it_has_doubled_and_not_all_the_time() -> None:
    async def world(mesh: Members) -> None:
        for _ in range(2):
            await mesh.join()
        amber, birch = mesh.members
        await asyncio.sleep(10.0)
        changes: list[None] = []
        birch.on_change(lambda: changes.append(None))
        version, posted = birch.view.version, mesh.relays[0].posted["announcement"]
        for sessions in range(1, 21):  # in 2 s
            mesh.stage = replace(mesh.stage, sessions=sessions)
            amber.load_changed()
            await asyncio.sleep(0.1)
        await asyncio.sleep(6.0)
        said = birch.view.get(mesh.node(0))
        assert said is not None
        assert said.stages[0].sessions == 20
        assert birch.view.version > version
        assert changes == []
        assert mesh.relays[0].posted["announcement"] - posted <= 3
        posted = mesh.relays[0].posted["announcement"]
        mesh.stage = replace(mesh.stage, sessions=25)
        amber.load_changed()
        await asyncio.sleep(6.0)
        assert mesh.relays[0].posted["announcement"] == posted

    in_virtual_time(world, MemoryRelay())


def test_a_node_that_needs_more_than_its_cell_holds_hears_the_next_wider_one() -> None:
    config = MembershipConfig(cells=CellsConfig(fewest=4, most=16))

    async def world(mesh: Members) -> None:
        for _ in range(60):
            await mesh.join(config=config)
        await asyncio.sleep(300.0)  # those of other cells have run out
        needy = mesh.members[5]
        natural, heard = needy.listening.depth, len(needy.view)
        assert natural > 0
        needy.needs_more = lambda: needy.listening.depth == natural
        await asyncio.sleep(20.0)
        assert needy.listening.depth == natural - 1
        assert len(needy.view) > 1.3 * heard

    in_virtual_time(world, MemoryRelay(delay_s=0.05))


faults = st.lists(
    st.tuples(
        st.sampled_from(["outage", "cut", "kill", "join", "change", "suspect", "wait"]),
        st.integers(0, 99),
    ),
    max_size=12,
)


@settings(max_examples=25, deadline=None)
@given(faults, st.integers(0, 1000), st.booleans())
def test_after_any_faults_all_that_live_see_each_other_and_nobody_else(
    happened: list[tuple[str, int]], seed: int, lossy: bool
) -> None:
    async def world(mesh: Members) -> None:
        relays, living = mesh.relays, list(range(6))
        for _ in living:
            await mesh.join()
        for what, which in happened:
            await asyncio.sleep(which / 10)
            number = living[which % len(living)]
            if what == "outage":
                relays[which % 2].stop()
                asyncio.get_running_loop().call_later(20.0, relays[which % 2].start)
            elif what == "cut":
                relays[which % 2].cut(mesh.node(number))
                asyncio.get_running_loop().call_later(
                    20.0, relays[which % 2].heal, mesh.node(number)
                )
            elif what == "kill" and len(living) > 2:
                living.remove(number)
                await mesh.kill(number)
            elif what == "join":
                await mesh.join()
                living.append(len(mesh.members) - 1)
            elif what == "change":
                mesh.members[number].changed()
            elif what == "suspect":
                mesh.members[number].suspect(mesh.node(which % len(mesh.members)))
        await asyncio.sleep(330.0)  # outages end, losses are made up for, the dead run out
        assert mesh.complete(living)

    loss = 0.2 if lossy else 0.0
    relays = [
        MemoryRelay(f"memory://{n}", delay_s=0.1, jitter_s=3.0, loss=loss, seed=seed + n)
        for n in range(2)
    ]
    in_virtual_time(world, *relays, seed=seed)


def test_nodes_whose_clocks_are_wrong_are_in_the_mesh_and_say_so() -> None:
    async def world(mesh: Members) -> None:
        for number in range(10):
            await mesh.join(skew_s={3: 7200.0, 6: -3000.0}.get(number, 0.0))
        await asyncio.sleep(150.0)
        assert mesh.complete(list(range(10)))
        skewed = {(n, round(e.offset_s, -2)) for n, e in mesh.events if isinstance(e, ClockSkewed)}
        assert skewed == {(3, -7200.0), (6, 3000.0)}

    in_virtual_time(world, MemoryRelay(delay_s=0.05))


def test_the_same_seed_gives_the_same_story() -> None:
    def story() -> list[tuple[int, Event]]:
        told: list[tuple[int, Event]] = []

        async def world(mesh: Members) -> None:
            for _ in range(8):
                await mesh.join()
            await mesh.kill(2)
            mesh.members[4].suspect(mesh.node(2))
            await asyncio.sleep(300.0)
            told.extend(mesh.events)

        in_virtual_time(world, MemoryRelay(delay_s=0.1, jitter_s=2.0, loss=0.2, seed=5))
        return told

    assert story() == story()
