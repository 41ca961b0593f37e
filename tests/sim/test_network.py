"""Wires of the simulator: what a frame costs on its way, and ways that are broken."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from shoal.sim.loop import run
from shoal.transport import Contact, Frame, Links, MemoryNetwork
from shoal.transport.memory import Path, Pipe
from shoal.units import NodeId
from tests.transport.nodes import AMBER, BIRCH, CEDAR

ALL = (AMBER, BIRCH, CEDAR)


class Listening:
    """Three nodes, with what came to each and when."""

    def __init__(self) -> None:
        self.links: dict[NodeId, Links] = {}
        self.came: list[tuple[float, NodeId, int]] = []  # when, to whom, bytes
        self.lost: list[tuple[float, NodeId, NodeId]] = []


@asynccontextmanager
async def listening(network: MemoryNetwork) -> AsyncIterator[Listening]:
    mesh, clock = Listening(), asyncio.get_running_loop().time
    async with AsyncExitStack() as stack:
        for each in ALL:
            contacts = {
                one.node: Contact(one.node, one.transport_key, (f"{one.node}.memory:1",))
                for one in ALL
            }
            links = Links(each, [network.carrier(each)], resolve=contacts.get)
            me = each.node
            links.on(1, lambda _, f, me=me: mesh.came.append((clock(), me, len(f.body))))
            links.on_lost(lambda peer, _, me=me: mesh.lost.append((clock(), me, peer)))
            mesh.links[me] = await stack.enter_async_context(links)
        yield mesh


def test_a_frame_takes_its_delay_and_its_bytes() -> None:
    async def main() -> float:
        path = Path(delay_s=0.1, bytes_per_s=1e6)
        async with listening(MemoryNetwork(paths=lambda a, b: path)) as mesh:
            await mesh.links[AMBER.node].connect(BIRCH.node)
            await asyncio.sleep(5)
            sent_at = asyncio.get_running_loop().time()
            mesh.links[AMBER.node].send(BIRCH.node, Frame(1, b"", bytes(500_000)))
            await asyncio.sleep(2)
            return mesh.came[0][0] - sent_at

    assert run(main) == pytest.approx(0.6, abs=0.001)


def test_a_frame_may_stand_for_more_bytes_than_it_has() -> None:
    async def main() -> tuple[float, int]:
        path = Path(bytes_per_s=1e6)
        network = MemoryNetwork(paths=lambda a, b: path, weigh=lambda f: 1_000_000 if f.body else 0)
        async with listening(network) as mesh:
            await mesh.links[AMBER.node].connect(BIRCH.node)
            begin = asyncio.get_running_loop().time()
            mesh.links[AMBER.node].send(BIRCH.node, Frame(1, b"", b"x"))
            await asyncio.sleep(3)
            assert not mesh.lost, "its pieces are signs of life"
            return mesh.came[0][0] - begin, network.sent[AMBER.node, BIRCH.node]

    took_s, sent = run(main)
    assert took_s == pytest.approx(1.0, abs=0.01)
    assert sent > 1_000_000


def test_ways_through_one_pipe_share_it() -> None:
    async def main() -> list[float]:
        card = Pipe(1e6)
        network = MemoryNetwork(paths=lambda a, b: Path(pipes=(card,)) if a == AMBER.node else None)
        async with listening(network) as mesh:
            for other in (BIRCH, CEDAR):
                await mesh.links[AMBER.node].connect(other.node)
            begin = asyncio.get_running_loop().time()
            for other in (BIRCH, CEDAR):
                mesh.links[AMBER.node].send(other.node, Frame(1, b"", bytes(200_000)))
            await asyncio.sleep(2)
            return [at - begin for at, _, _ in mesh.came]

    assert run(main) == pytest.approx([0.2, 0.4], abs=0.01)


def test_a_way_that_is_silent_in_one_direction_ends_the_link_at_the_deaf_end() -> None:
    async def main() -> list[tuple[float, NodeId, NodeId]]:
        network = MemoryNetwork()
        async with listening(network) as mesh:
            await mesh.links[AMBER.node].connect(BIRCH.node)
            network.silence(AMBER.node, BIRCH.node)
            await asyncio.sleep(3)
            return mesh.lost

    lost = run(main)
    assert lost[0][1:] == (BIRCH.node, AMBER.node)


def test_groups_that_are_parted_hear_nothing_of_each_other_until_they_are_reunited() -> None:
    async def main() -> list[NodeId]:
        network = MemoryNetwork()
        async with listening(network) as mesh:
            network.partition([AMBER.node], [BIRCH.node])
            for other in (BIRCH, CEDAR):
                mesh.links[AMBER.node].send(other.node, Frame(1, b"", b"x"))
            await asyncio.sleep(10)
            assert [to for _, to, _ in mesh.came] == [CEDAR.node]
            network.reunite()
            mesh.links[AMBER.node].send(BIRCH.node, Frame(1, b"", b"x"))
            await asyncio.sleep(1)
            return [to for _, to, _ in mesh.came]

    assert run(main) == [CEDAR.node, BIRCH.node]


@pytest.mark.parametrize(("silently", "noticed_within_s"), [(False, 0.01), (True, 1.2)])
def test_a_dead_process_is_noticed_at_once_and_a_dead_machine_soon(
    silently: bool, noticed_within_s: float
) -> None:
    async def main() -> float:
        network = MemoryNetwork()
        async with listening(network) as mesh:
            await mesh.links[AMBER.node].connect(BIRCH.node)
            await asyncio.sleep(1)
            network.kill(BIRCH.node, silently=silently)
            killed_at = asyncio.get_running_loop().time()
            await asyncio.sleep(3)
            return next(at for at, me, _ in mesh.lost if me == AMBER.node) - killed_at

    assert run(main) <= noticed_within_s
