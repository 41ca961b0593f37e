"""Through whom no session is planned: what we saw ourselves, and nobody's word alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, cast

from shoal.bus.membership import Membership
from shoal.errors import LinkClosed
from shoal.node.neighbours import Neighbours
from shoal.transport import Links
from shoal.units import NodeId

AMBER, BIRCH = NodeId("amber"), NodeId("birch")


class Said:
    """What membership knows of doubts."""

    def __init__(self) -> None:
        self.doubts: set[NodeId] = set()

    def doubtful(self) -> frozenset[NodeId]:
        return frozenset(self.doubts)

    def suspect(self, node: NodeId) -> None:
        self.doubts.add(node)


class Wires:
    def __init__(self) -> None:
        self.dead: set[NodeId] = set()
        self.lose: Callable[[NodeId, str], None]

    def on_lost(self, call: Callable[[NodeId, str], None]) -> None:
        self.lose = call

    async def connect(self, node: NodeId) -> None:
        if node in self.dead:
            raise LinkClosed("nobody answers")


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
