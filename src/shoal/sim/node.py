"""One node of a simulated mesh: the parts that `node.Node` joins, over carriers of the simulator.

Real are membership, links, pipeline, serving, router and placer. Modelled are the machine (its
engine takes virtual time), the wires and the relays.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar, cast

from .. import __version__
from ..bus import Announcement, StageOffer
from ..bus.membership import Membership, MembershipConfig
from ..bus.memory import MemoryBus, MemoryRelay
from ..engine.pace import SpeedMeter
from ..errors import LinkClosed, NoCapacity
from ..events import Emit
from ..hardware import Capability, Speed
from ..identity import Identity, Mesh
from ..models.catalogue import Catalogue
from ..node.choosing import Candidate, pool_of
from ..node.placing import Holding, Placer, PlacerConfig
from ..node.router import Router
from ..pipeline import Pipeline, Planner, Serving, ServingConfig
from ..pipeline.loading import Loaded
from ..placement import Pool, decide
from ..transport import Contact, Links, MemoryNetwork
from ..transport.memory import address_of
from ..units import ModelId, NodeId, Slice
from .engine import SimSampler, SimStage, SimStageConfig, SketchStage, Timing, by_speed
from .model import SimModel
from .thread import SimThread

if TYPE_CHECKING:
    from ..engine.thread import EngineThread
    from ..models.checkpoint import Checkpoint

PAGE_TOKENS = 16
RECONNECT_S = 2.0
LEAVE_S = 10.0
MAX_KV_TOKENS = 1 << 20  # of one stage: more only costs the simulator memory

T = TypeVar("T")


class Clock(Protocol):
    def __call__(self) -> float: ...


@dataclass(kw_only=True, frozen=True)
class Machine:
    """What a node is: `speed` says how long its steps take, for a model and a slice of it."""

    memory_bytes: int
    speed: Callable[[SimModel, Slice], Speed]
    timing: Callable[[SimModel, Slice], Timing] | None = None  # None = by `speed`
    capability: Capability = field(default_factory=Capability)
    load_bytes_per_s: float = 1e9
    models: tuple[SimModel, ...] = ()  # that it has the files of
    pinned: Slice | None = None
    gateway: bool = True
    region: str = ""
    exact: bool = True  # False: no text, just time


@dataclass(frozen=True)
class Surroundings:
    """What all nodes of a world share."""

    mesh: Mesh
    network: MemoryNetwork
    relays: tuple[MemoryRelay, ...]
    models: Mapping[str, SimModel]
    epoch_s: float = 1_700_000_000.0  # the wall clock at 0 s
    membership: MembershipConfig = field(default_factory=MembershipConfig)
    placer: PlacerConfig = field(default_factory=PlacerConfig)
    make_planner: Callable[[SimNode], Planner] | None = None  # None = the router's own
    make_placer: Callable[[SimNode], Placer[Any] | None] | None = None


class SimNode:
    """`async with` it: it joins, and leaving the block cancels all of it without a goodbye."""

    def __init__(
        self,
        name: str,
        identity: Identity,
        machine: Machine,
        around: Surroundings,
        *,
        chance: random.Random,
        emit: Emit,
        skew_s: float = 0.0,
    ) -> None:
        self.name, self.identity, self.machine, self.around = name, identity, machine, around
        self.chance, self.emit = chance, emit
        self.skew_s = skew_s  # of its wall clock
        self.id = identity.node
        self.thread = SimThread()
        self.catalogue = SimCatalogue(around.models)
        self.loaded_bytes = 0
        self.stage: SimStage | None = None  # the one in service
        self.failed: list[BaseException] = []  # bugs: what parts of it died of
        self._doubtful: set[NodeId] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stack = AsyncExitStack()

    # ---- life

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await self._start(stack)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._stack.aclose()

    async def _start(self, stack: AsyncExitStack) -> None:
        loop = asyncio.get_running_loop()
        self.clock: Clock = loop.time
        around = self.around
        self.bus = MemoryBus(
            self.identity, around.mesh, around.relays, emit=self.emit, clock=self.wall_clock
        )
        self.membership = Membership(
            self.bus,
            self.identity,
            self._describe,
            emit=self.emit,
            clock=self.clock,
            wall_clock=self.wall_clock,
            chance=self.chance,
            config=around.membership,
        )
        carrier = around.network.carrier(self.identity)
        self.links = Links(self.identity, [carrier], resolve=self._resolve, emit=self.emit)
        self.links.on_lost(self._on_lost)
        self.router = Router(
            self.id,
            cast(Catalogue, self.catalogue),
            self._offers,
            lambda: frozenset(self._doubtful),
        )
        planner = around.make_planner(self) if around.make_planner else self.router.plan
        self.pipeline = Pipeline(
            self.links,
            planner,
            emit=self.emit,
            clock=self.clock,
            wall_clock=self.wall_clock,
            draw=self.chance.randbytes,
        )
        stack.push_async_callback(self._stop_tasks)
        await stack.enter_async_context(self.pipeline)
        await stack.enter_async_context(self.links)
        self.serving = Serving(
            self.id,
            self.pipeline,
            self.links,
            cast("EngineThread", self.thread),
            ServingConfig(memory_bytes=self.machine.memory_bytes, page_tokens=PAGE_TOKENS),
            emit=self.emit,
            clock=self.clock,
            changed=self.membership.changed,
        )
        self.serving.load_with(self._load)
        await stack.enter_async_context(self.bus)
        self.start_task(self.membership.run())
        self.start_task(self._keep_serving())

    def wall_clock(self) -> float:
        return self.around.epoch_s + self.skew_s + self.clock()

    async def leave(self) -> None:
        """As Ctrl-C: goodbye first, then what runs here may end in peace."""
        self.serving.drain()
        await self.membership.leave()
        try:
            async with asyncio.timeout(LEAVE_S):
                await self.pipeline.idle()
        except TimeoutError:
            pass
        self.serving.stop()

    def start_task(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.failed.append(error)

    async def _stop_tasks(self) -> None:
        for task in sorted(self._tasks, key=lambda each: each.get_name()):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ---- the mesh around us

    def _describe(self, sequence: int) -> Announcement:
        return Announcement(
            card=self.identity.card,
            name=self.name,
            addresses=(),  # where a node is in memory, its id says
            capability=self.machine.capability,
            stages=self.serving.offers(),
            gateway=self.machine.gateway,
            software=f"shoal {__version__}",
            sequence=sequence,
            sent_at=int(self.wall_clock()),
            offered_bytes=self.machine.memory_bytes,
            can_serve=tuple(model.model_id for model in self.machine.models),
        )

    def _offers(self) -> Iterator[tuple[NodeId, StageOffer]]:
        for offer in self.serving.offers():
            yield self.id, offer
        for announcement in self.membership.view.announcements():
            for offer in announcement.stages:
                yield announcement.node, offer

    def _resolve(self, node: NodeId) -> Contact | None:
        known = self.membership.view.get(node)
        return Contact(node, known.card.transport_key, (address_of(node),)) if known else None

    def _on_lost(self, node: NodeId, reason: str) -> None:
        self._doubtful.add(node)
        self.start_task(self._reconnect(node))

    async def _reconnect(self, node: NodeId) -> None:
        try:
            async with asyncio.timeout(RECONNECT_S):
                await self.links.connect(node)
        except (LinkClosed, TimeoutError):
            self.membership.suspect(node)
        self._doubtful.discard(node)

    # ---- our own slice

    async def _keep_serving(self) -> None:
        if not self.machine.models:
            return
        if self.machine.pinned is not None:
            await self.serve(self.machine.models[0].model_id, self.machine.pinned)
            return
        make = self.around.make_placer
        self.placer = make(self) if make else self.usual_placer()
        if self.placer is None:
            return
        self.membership.on_change(self.placer.changed)
        await asyncio.sleep(0.5)  # as a node does: hear the others first
        await self.placer.start()
        await self.placer.run()

    def usual_placer(self) -> Placer[Pool]:
        return Placer(
            self._view,
            lambda pool: decide(self.id, pool),
            self,
            run_apart=call_here,
            clock=self.clock,
            chance=self.chance,
            config=self.around.placer,
        )

    def _view(self) -> Pool:
        return pool_of(
            self._describe(0),
            self.membership.view.announcements(),
            [Candidate(each.model_id, each.shape, each.dtype) for each in self.machine.models],
        )

    # what the placer asks of us

    def held(self) -> Holding | None:
        slices = self.serving.slices
        return Holding(slices[0].checkpoint.model_id, slices[0].layers) if slices else None

    def drain(self) -> None:
        self.serving.drain()

    def resume(self) -> None:
        """Nothing takes a drain back yet."""

    async def vacate(self, patience_s: float) -> None:
        try:
            async with asyncio.timeout(patience_s):
                await self.pipeline.idle()
        except TimeoutError:
            pass

    async def serve(self, model: ModelId, layers: Slice) -> None:
        of = next(each for each in self.around.models.values() if each.model_id == model)
        pinned = self.machine.pinned is not None
        self.serving.stop()
        await self.serving.serve(
            cast("Checkpoint", of), layers, self.machine.speed(of, layers), pinned=pinned
        )

    async def _load(
        self,
        thread: EngineThread,
        checkpoint: Checkpoint,
        layers: Slice,
        config: ServingConfig,
        expected: Speed,
        clock: Callable[[], float],
    ) -> Loaded:
        """The twin of `serving.load`: bytes and a rate."""
        model = cast(SimModel, checkpoint)
        stage = await thread.run(self._load_stage, model, layers)
        return Loaded(stage, SimSampler, SpeedMeter(len(layers), expected))  # type: ignore[arg-type]

    def _load_stage(self, model: SimModel, layers: Slice) -> SimStage:
        machine, size = self.machine, model.shape.slice_bytes(layers)
        room = machine.memory_bytes - size
        tokens = min(MAX_KV_TOKENS, room // max(1, model.kv_bytes * len(layers)))
        if tokens < PAGE_TOKENS:
            raise NoCapacity(f"layers {layers} of {model.name} leave no room for a KV cache")
        self.loaded_bytes += size
        self.thread.spend(size / machine.load_bytes_per_s)
        timing = machine.timing or (lambda of, part: by_speed(machine.speed(of, part)))
        kind = SimStage if machine.exact else SketchStage
        pages = SimStageConfig(PAGE_TOKENS, tokens // PAGE_TOKENS)
        self.stage = kind(model, layers, pages, timing(model, layers), self.thread.spend)
        return self.stage


class SimCatalogue:
    """The twin of `Catalogue`: every node knows every model's vocabulary."""

    def __init__(self, models: Mapping[str, SimModel]) -> None:
        self._models = models

    def get(self, name: str) -> SimModel | None:
        return self._models.get(name)


async def call_here(function: Callable[[], T]) -> T:
    """In place of a thread."""
    return function()
