"""What a stage sends: to whom it gets through, and to whom too much is on the way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

from ..errors import LinkClosed, LocalError, Overloaded
from ..transport import Links
from ..units import NodeId
from .messages import Message, to_frame
from .session import Forward, Replay

CONGESTED_S = 120.0  # a next hop that takes nothing for so long is lost; gateways gave up before


class Outbox:
    """Set `tasks` before anything has to be waited for. `lost` hears of nodes that cannot be
    reached, `freed` that somebody is no longer `congested`.
    """

    def __init__(
        self, links: Links, lost: Callable[[NodeId, str], None], freed: Callable[[], None]
    ) -> None:
        self._links, self._lost, self._freed = links, lost, freed
        self.tasks: asyncio.TaskGroup | None = None
        self.congested: set[NodeId] = set()  # next hops with too much on the way to them

    def close(self) -> None:
        """Nobody hears of anything any more."""
        self.tasks, self._lost = None, lambda node, why: None

    def send(
        self, node: NodeId, message: Message, body: bytes | memoryview = b"", *, bulk: bool = False
    ) -> None:
        """A message that cannot be sent needs no answer here: the lost link ends its sessions,
        after the instructions at hand are done, never in the middle of them.
        """
        try:
            self._links.send(node, to_frame(message, body, bulk=bulk))
        except (LinkClosed, Overloaded) as error:
            asyncio.get_running_loop().call_soon(self._lost, node, error.message)

    def connect(
        self, node: NodeId, made: Callable[[], None], failed: Callable[[str], None]
    ) -> None:
        if self._links.is_connected(node):  # the usual case: no task, no turn of the loop
            made()
        else:
            self._start(self._connect(node, made, failed))

    async def _connect(
        self, node: NodeId, made: Callable[[], None], failed: Callable[[str], None]
    ) -> None:
        try:
            await self._links.connect(node)
        except LocalError as error:
            failed(error.message)
        else:
            made()

    def forward(self, node: NodeId, forward: Forward, hidden: memoryview) -> None:
        """Prompts for it rest until this is on its way."""
        self.send(node, forward.message, hidden, bulk=forward.bulk)
        if node not in self.congested and self.tasks is not None:
            self.congested.add(node)
            self._start(self._drain(node))

    async def _drain(self, node: NodeId) -> None:
        try:
            async with asyncio.timeout(CONGESTED_S):
                await self._links.drain(node)
        except LinkClosed as error:
            self._lost(node, error.message)
        except TimeoutError:
            self._links.drop(node, "it does not take what is sent to it")
        self.congested.discard(node)
        self._freed()

    def replay(self, replay: Replay, then: Callable[[], None]) -> None:
        """Chunk by chunk: `then` comes the next, as the next hop takes them."""
        self.send(replay.node, replay.message, replay.hidden, bulk=True)
        self._start(self._replay_on(replay.node, then))

    async def _replay_on(self, node: NodeId, then: Callable[[], None]) -> None:
        try:
            async with asyncio.timeout(CONGESTED_S):
                await self._links.drain(node)
        except (LinkClosed, TimeoutError):
            return  # the lost link suspends the session, silence ends it
        then()

    def _start(self, work: Coroutine[None, None, None]) -> None:
        if self.tasks is not None:
            self.tasks.create_task(work)
        else:
            work.close()
