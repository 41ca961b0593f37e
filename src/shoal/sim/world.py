"""A whole mesh in virtual time: nodes that come, go, fall silent and are asked, and what happened.

    async def main() -> None:
        async with World([toy], seed=1) as world:
            for _ in range(3):
                await world.join(machine)
            await world.until(lambda: world.is_served("toy"))
            asked = await world.ask("toy", (1, 2, 3), 20)
            assert asked.is_right

    run(main)

The same seed gives the same run, to the last event: `digest` tells two runs apart.
"""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Self, cast

import msgspec

from ..bus.membership import MembershipConfig
from ..bus.memory import MemoryRelay
from ..engine.request import Sampling
from ..errors import ShoalError
from ..events import Event, PagesChanged, RouteTaken, StageChanged, StepDone
from ..identity import Identity, Mesh
from ..node.placing import Placer, PlacerConfig
from ..node.routing import RoutingConfig
from ..pipeline import Planner, Request, Stream
from ..transport import LinksConfig, MemoryNetwork
from ..units import NodeId
from .asked import Asked
from .engine import more_bytes
from .loop import OWNER, VirtualLoop
from .machine import Machine
from .model import SimModel
from .node import SimNode, Surroundings

QUIET = (StepDone, PagesChanged)  # so many that nobody keeps them; what follows from them is told


class Fault(msgspec.Struct, frozen=True, tag=True):
    """What was done to the mesh: join, leave, kill, stop, continue, partition, heal ..."""

    what: str
    detail: str = ""


Happening = Event | Fault
Listener = Callable[[float, str, Happening], None]  # seconds, name of the node or "", what


@lru_cache(maxsize=1 << 14)
def identity_of(seed: int, number: int) -> Identity:
    """The same numbers are the same node, always."""
    return Identity.from_secret(hashlib.sha256(b"%d node %d" % (seed, number)).digest())


@dataclass(kw_only=True, frozen=True, slots=True)
class WorldConfig:
    """How all of its nodes are set up."""

    membership: MembershipConfig = MembershipConfig()
    links: LinksConfig = LinksConfig()
    placer: PlacerConfig = PlacerConfig()
    routing: RoutingConfig = RoutingConfig()
    surveys: bool = True
    keep_log: bool = True


class World:
    """`async with` it inside of `loop.run`. Nodes are called by their names."""

    def __init__(
        self,
        models: Sequence[SimModel],
        *,
        seed: int = 0,
        network: MemoryNetwork | None = None,
        relays: Sequence[MemoryRelay] | None = None,
        make_planner: Callable[[SimNode], Planner] | None = None,
        make_placer: Callable[[SimNode], Placer[Any] | None] | None = None,
        config: WorldConfig | None = None,
    ) -> None:
        """`make_planner` and `make_placer` put other rules in the place of the router's and the
        placer's.
        """
        config = config or WorldConfig()
        self.seed = seed
        self.chance = random.Random(seed)
        self.network = network or MemoryNetwork(seed=seed, weigh=more_bytes)
        self.relays = tuple([MemoryRelay(seed=seed)] if relays is None else relays)
        self.around = Surroundings(
            mesh=Mesh.public("simulated"),
            network=self.network,
            relays=self.relays,
            models={model.name: model for model in models},
            membership=config.membership,
            links=config.links,
            placer=config.placer,
            routing=config.routing,
            surveys=config.surveys,
            make_planner=make_planner,
            make_placer=make_placer,
        )
        self.nodes: dict[str, SimNode] = {}  # those that live, stopped ones among them
        self.asked: list[Asked] = []
        self.log: list[tuple[float, str, Happening]] = []
        self.listeners: list[Listener] = [self._keep] if config.keep_log else []
        self.counts: Counter[str] = Counter()  # routes, slices put into service
        self._gone_bytes = 0  # loaded by nodes that are gone
        self._served: set[str] = set()  # names of nodes that have ever served
        self._number = 0
        self._hash = hashlib.sha256()
        self._tasks: dict[SimNode, asyncio.Task[None]] = {}
        self._clients: dict[asyncio.Task[None], Asked] = {}
        self._contexts: dict[SimNode, contextvars.Context] = {}
        self._failed: list[BaseException] = []  # bugs, of nodes that are gone
        self._encoder = msgspec.json.Encoder()

    async def __aenter__(self) -> Self:
        self._loop = cast(VirtualLoop, asyncio.get_running_loop())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for node in list(self.nodes.values()):
            await self._end(node)
        if exc_info[0] is None:
            self.check()

    @property
    def now(self) -> float:
        return self._loop.time()

    def digest(self) -> str:
        """Of all that happened so far."""
        return self._hash.hexdigest()

    # ---- nodes

    async def join(
        self, machine: Machine, name: str = "", *, number: int | None = None, skew_s: float = 0.0
    ) -> SimNode:
        """A node is up, and looks for a slice. The same `number` again is the same identity; its
        wall clock is `skew_s` ahead.
        """
        self._number += 1
        name = name or f"node-{self._number}"
        if name in self.nodes:
            raise ValueError(f"there is a node {name!r} already")
        context = contextvars.copy_context()
        context.run(OWNER.set, name)
        node = SimNode(
            name,
            identity_of(self.seed, self._number if number is None else number),
            machine,
            self.around,
            chance=random.Random(self.chance.getrandbits(64)),
            emit=partial(self._emit, name),
            skew_s=skew_s,
        )
        self.nodes[name] = node
        self._tell(name, Fault("join", node.id))
        self._contexts[node] = context
        self._tasks[node] = task = self._loop.create_task(node.live(), context=context)
        up = self._loop.create_task(node.up.wait())
        await asyncio.wait([task, up], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            up.cancel()
            task.result()
        return node

    async def leave(self, name: str) -> None:
        """It drains, says goodbye and goes."""
        node = self.nodes[name]
        self._tell(name, Fault("leave"))
        await self._loop.create_task(node.leave(), context=self._contexts[node].copy())
        if self.nodes.get(name) is node:  # it was not killed meanwhile
            await self._end(node)

    async def kill(self, name: str, *, silently: bool = False) -> None:
        """As kill -9: it is gone in the middle of what it did, and its connections break; or
        `silently`, as a machine without power, and nobody gets an error.
        """
        node = self.nodes[name]
        self._tell(name, Fault("kill", "silently" if silently else ""))
        await self._end(node, silently=silently)

    def stop(self, name: str) -> None:
        """As SIGSTOP: its connections stay, and it says nothing."""
        self._tell(name, Fault("stop"))
        self._loop.stop_owner(name)

    def resume(self, name: str) -> None:
        """As SIGCONT."""
        self._tell(name, Fault("continue"))
        self._loop.continue_owner(name)

    def slow(self, name: str, times: float) -> None:
        """Its steps take so many times as long as they should."""
        self._tell(name, Fault("slow", f"{times:g}"))
        self.nodes[name].loader.slow(times)

    async def _end(self, node: SimNode, *, silently: bool = False) -> None:
        """Nothing that it does on its way out reaches anybody."""
        del self.nodes[node.name]
        self.network.kill(node.id, silently=silently)
        for task, asked in list(self._clients.items()):
            if asked.gateway == node.name:
                asked.end("gateway lost", self.now)
                task.cancel()
        task = self._tasks.pop(node)
        if hasattr(node, "bus"):
            await node.bus.__aexit__(None, None, None)
        self._loop.continue_owner(node.name)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        self._gone_bytes += node.loader.loaded_bytes
        self._failed += node.failed
        del self._contexts[node]

    # ---- the network

    def ids(self, names: Iterable[str]) -> list[NodeId]:
        return [self.nodes[name].id for name in names]

    def partition(self, *groups: Iterable[str], off_relays: Iterable[str] = ()) -> None:
        """Nothing gets from one group to another, and no relay is reached by who is off them."""
        off = list(off_relays)
        named = [list(group) for group in groups]
        self._tell("", Fault("partition", " | ".join(" ".join(group) for group in named)))
        self.network.partition(*(self.ids(group) for group in named))
        for relay in self.relays:
            relay.cut(*self.ids(off))

    def heal(self) -> None:
        """Every partition, cut and silence is over."""
        self._tell("", Fault("heal"))
        self.network.heal()
        for relay in self.relays:
            relay.heal()

    # ---- requests

    def request(
        self,
        model: str,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        gateway: str,
        patience_s: float | None = None,
    ) -> Asked:
        """A client asks that gateway, from now on. After `patience_s` it hangs up."""
        of, node = self.around.models[model], self.nodes[gateway]
        asked = Asked(of, tuple(prompt), max_tokens, gateway, self.now)
        self.asked.append(asked)
        context = self._contexts[node].copy()
        client = self._loop.create_task(self._client(node, asked, patience_s), context=context)
        self._clients[client] = asked
        client.add_done_callback(self._client_done)
        return asked

    async def ask(
        self,
        model: str,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        gateway: str = "",
        patience_s: float | None = None,
    ) -> Asked:
        """Back when it has ended, well or not. Without a name, the first node is asked."""
        name = gateway or next(iter(self.nodes))
        asked = self.request(model, prompt, max_tokens, gateway=name, patience_s=patience_s)
        await asked.done.wait()
        return asked

    async def _client(self, node: SimNode, asked: Asked, patience_s: float | None) -> None:
        sampling = Sampling(temperature=0, max_tokens=asked.max_tokens)
        request = Request(asked.model.name, asked.prompt, sampling)
        stream = node.pipeline.gateway.generate(request)
        try:
            async with asyncio.timeout(patience_s):
                await self._read(stream, asked)
            asked.end("whole", self.now)
        except ShoalError as error:
            asked.fail(error, self.now)
        except TimeoutError:
            asked.end("given up", self.now)
        finally:
            await stream.aclose()

    async def _read(self, stream: Stream, asked: Asked) -> None:
        async for sampled in stream:
            asked.tokens.append(sampled.token)
            asked.came_s.append(self.now)

    def _client_done(self, client: asyncio.Task[None]) -> None:
        asked = self._clients.pop(client)
        asked.end("gateway lost", self.now)
        if not client.cancelled() and (error := client.exception()) is not None:
            self._failed.append(error)

    # ---- watching

    def is_served(self, model: str) -> bool:
        """Every gateway finds a route."""
        gateways = [node for node in self.nodes.values() if node.machine.gateway]
        return all(_has_route(node, model) for node in gateways)

    async def until(self, holds: Callable[[], bool], *, limit_s: float = 3600.0) -> None:
        """Let time pass until something is so; looked at ten times a second."""
        async with asyncio.timeout(limit_s):
            while not holds():
                await self.sleep(0.1)

    async def sleep(self, seconds: float) -> None:
        """Let time pass. Raises what any part of a node died of meanwhile."""
        await asyncio.sleep(seconds)
        self.check()

    def check(self) -> None:
        """Raises what a part of a node died of: a bug, never a fault of the mesh."""
        for failed in (self._failed, *(node.failed for node in self.nodes.values())):
            if failed:
                raise failed[0]

    def loaded_bytes(self) -> int:
        """Weights that were loaded by all nodes together, so far."""
        return self._gone_bytes + sum(node.loader.loaded_bytes for node in self.nodes.values())

    def _emit(self, name: str, event: Event) -> None:
        if name in self.nodes and not isinstance(event, QUIET):
            self._count(name, event)
            self._tell(name, event)

    def _count(self, name: str, what: Event) -> None:
        if isinstance(what, RouteTaken):
            self.counts["route"] += 1
        elif isinstance(what, StageChanged) and what.state == "serving":
            self.counts["serving"] += 1
            if name not in self._served:
                self._served.add(name)
                self.counts["first serving"] += 1

    def _tell(self, name: str, what: Happening) -> None:
        now = self._loop.time()
        self._hash.update(self._encoder.encode((now, name, what)))
        for listener in self.listeners:
            listener(now, name, what)

    def _keep(self, at_s: float, name: str, what: Happening) -> None:
        self.log.append((at_s, name, what))


def _has_route(node: SimNode, model: str) -> bool:
    try:
        return node.router.is_ready(model)
    except ShoalError:
        return False
