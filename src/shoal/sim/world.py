"""A whole mesh in virtual time: nodes that come, go, fall silent and are asked, and what happened.

async def main() -> None:
    async with World(models, seed=1) as world:
        for number in range(3):
            await world.join(machine)
        await world.settled("toy")
        answer = await world.ask("toy", prompt=(1, 2, 3), max_tokens=20)

run(main)
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, Self

import msgspec

from ..bus.membership import MembershipConfig
from ..bus.memory import MemoryRelay
from ..engine.request import Sampling
from ..errors import ShoalError
from ..events import Event, PagesChanged, StepDone
from ..identity import Identity, Mesh
from ..node.placing import Placer, PlacerConfig
from ..pipeline import Planner, Request
from ..transport import MemoryNetwork
from ..units import NodeId
from .model import SimModel
from .node import Machine, SimNode, Surroundings

_QUIET = (StepDone, PagesChanged)  # too many to be kept, and told by what follows from them


@lru_cache(maxsize=1 << 14)
def identity_of(seed: int, number: int) -> Identity:
    """The same numbers are the same node, always."""
    return Identity.from_secret(hashlib.sha256(b"%d node %d" % (seed, number)).digest())


@dataclass
class Asked:
    """A request as its client saw it."""

    model: str
    prompt: tuple[int, ...]
    max_tokens: int
    gateway: str
    at_s: float
    tokens: list[int] = field(default_factory=list)
    came_s: list[float] = field(default_factory=list)  # when each token came
    error: ShoalError | None = None
    done_s: float | None = None


class World:
    def __init__(
        self,
        models: Sequence[SimModel],
        *,
        seed: int = 0,
        network: MemoryNetwork | None = None,
        relays: Sequence[MemoryRelay] | None = None,
        membership: MembershipConfig | None = None,
        placer: PlacerConfig | None = None,
        make_planner: Callable[[SimNode], Planner] | None = None,
        make_placer: Callable[[SimNode], Placer[Any] | None] | None = None,
    ) -> None:
        self.seed = seed
        self.chance = random.Random(seed)
        self.network = network or MemoryNetwork(seed=seed)
        self.relays = tuple(relays or [MemoryRelay(seed=seed)])
        self.around = Surroundings(
            mesh=Mesh.public("simulated"),
            network=self.network,
            relays=self.relays,
            models={model.name: model for model in models},
            membership=membership or MembershipConfig(),
            placer=placer or PlacerConfig(),
            make_planner=make_planner,
            make_placer=make_placer,
        )
        self.nodes: dict[str, SimNode] = {}  # by name, those that live
        self.log: list[tuple[float, str, Event]] = []  # (seconds, node's name, what)
        self.asked: list[Asked] = []
        self._number = 0
        self._failed: list[BaseException] = []  # of nodes that are gone

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for name in list(self.nodes):
            await self._end(self.nodes.pop(name))
        if exc_info[0] is None:
            self._check()

    def digest(self) -> str:
        """Of all that happened: two runs are the same when their digests are."""
        lines = msgspec.json.encode(self.log)
        return hashlib.sha256(lines).hexdigest()

    # ---- nodes

    async def join(self, machine: Machine, name: str = "", *, skew_s: float = 0.0) -> SimNode:
        """A new node, up and about to look for a slice."""
        self._number += 1
        name = name or f"node-{self._number}"
        identity = identity_of(self.seed, self._number)
        node = SimNode(
            name,
            identity,
            machine,
            self.around,
            chance=random.Random(self.chance.getrandbits(64)),
            emit=partial(self._emit, name),
            skew_s=skew_s,
        )
        self.nodes[name] = node
        await node.__aenter__()
        return node

    async def leave(self, name: str) -> None:
        """It drains, says goodbye and goes."""
        node = self.nodes[name]
        await node.leave()
        del self.nodes[name]
        await self._end(node)

    async def kill(self, name: str) -> None:
        """As kill -9: it is gone in the middle of what it did."""
        node = self.nodes.pop(name)
        self.network.cut(node.id)
        await self._end(node)

    async def _end(self, node: SimNode) -> None:
        await node.__aexit__(None, None, None)
        self._failed += node.failed

    def _check(self) -> None:
        """Raises what a part of a node died of: a bug, and never a fault of the mesh."""
        for failed in (self._failed, *(node.failed for node in self.nodes.values())):
            if failed:
                raise failed[0]

    def _emit(self, name: str, event: Event) -> None:
        if not isinstance(event, _QUIET) and name in self.nodes:
            self.log.append((self._loop.time(), name, event))

    # ---- requests

    async def ask(
        self, model: str, prompt: Sequence[int], max_tokens: int, *, gateway: str = ""
    ) -> Asked:
        """A client's whole request: back when it has ended, well or not."""
        name = gateway or next(iter(self.nodes))
        asked = Asked(model, tuple(prompt), max_tokens, name, self._loop.time())
        self.asked.append(asked)
        sampling = Sampling(temperature=0, max_tokens=max_tokens)
        stream = self.nodes[name].pipeline.gateway.generate(Request(model, asked.prompt, sampling))
        try:
            async for sampled in stream:
                asked.tokens.append(sampled.token)
                asked.came_s.append(self._loop.time())
        except ShoalError as error:
            asked.error = error
        finally:
            await stream.aclose()
        asked.done_s = self._loop.time()
        return asked

    async def until(self, holds: Callable[[], bool], *, limit_s: float = 3600.0) -> None:
        """Let time pass until something is so, looked at ten times a second."""
        async with asyncio.timeout(limit_s):
            while not holds():
                await asyncio.sleep(0.1)
                self._check()

    def layers(self) -> Iterator[tuple[str, str]]:
        """Who holds what."""
        for name, node in self.nodes.items():
            for served in node.serving.slices:
                yield name, f"{served.layers} {served.state}"

    def is_served(self, model: str) -> bool:
        """Every gateway's router finds a route."""
        gateways = [node for node in self.nodes.values() if node.machine.gateway]
        return all(_has_route(node, model) for node in gateways)

    def node_of(self, node: NodeId) -> SimNode | None:
        return next((each for each in self.nodes.values() if each.id == node), None)


def _has_route(node: SimNode, model: str) -> bool:
    try:
        return node.router.is_ready(model)
    except ShoalError:
        return False
