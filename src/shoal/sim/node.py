"""One node of a simulated mesh: the parts that `node.Node` joins, over carriers of the simulator.

Real are membership, links, pipeline, serving, distances, router and placer. Modelled are the
machine, whose engine takes virtual time, the wires and the relays.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

from .. import __version__
from ..bus import Announcement, StageOffer
from ..bus.membership import Membership, MembershipConfig
from ..bus.memory import MemoryBus, MemoryRelay, Posted
from ..events import Emit, Event, EventHub, PagesChanged
from ..identity import Identity, Mesh
from ..models.catalogue import Catalogue
from ..node.choosing import Candidate, pool_of
from ..node.demand import DemandMeter
from ..node.distances import Distances
from ..node.leaving import leave
from ..node.needs import Needs
from ..node.neighbours import Neighbours
from ..node.placing import Holding, Placer, PlacerConfig
from ..node.promises import Promises
from ..node.router import Router
from ..node.routing import Chooser, RoutingConfig
from ..node.survey import Surveyor
from ..pipeline import Pipeline, Planner, Serving, ServingConfig
from ..placement import Pool, decide
from ..transport import Links, LinksConfig, MemoryNetwork
from ..units import ModelId, NodeId, Slice
from .loop import OWNER, VirtualLoop
from .machine import PAGE_TOKENS, Loader, Machine
from .model import SimModel
from .thread import SimThread

if TYPE_CHECKING:
    from ..engine.thread import EngineThread
    from ..models.checkpoint import Checkpoint

LEAVE_S = 10.0
FIRST_VIEW_S = 0.5

T = TypeVar("T")


@dataclass(frozen=True)
class Surroundings:
    """What all nodes of a world share."""

    mesh: Mesh
    network: MemoryNetwork
    relays: tuple[MemoryRelay, ...]
    models: Mapping[str, SimModel]
    epoch_s: float = 1_700_000_000.0  # the wall clock at 0 s
    membership: MembershipConfig = field(default_factory=MembershipConfig)
    links: LinksConfig = field(default_factory=LinksConfig)
    placer: PlacerConfig = field(default_factory=PlacerConfig)
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    surveys: bool = True  # nodes measure the way to some others before there is work
    make_planner: Callable[[SimNode], Planner] | None = None  # None = the router's own
    make_placer: Callable[[SimNode], Placer[Any] | None] | None = None


class SimBus(MemoryBus):
    """What it hears, its node hears: in the node's context, and not while that is stopped."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._context = contextvars.copy_context()
        self._owner = OWNER.get()
        self._loop = cast(VirtualLoop, asyncio.get_running_loop())

    def hear(self, posted: Posted) -> None:
        if self._loop.is_stopped(self._owner):
            self._loop.call_soon(super().hear, posted, context=self._context)
        else:
            self._context.run(super().hear, posted)


class SimNode:
    """`live` is its whole life: it joins, and when its task is cancelled it is gone at once. Its
    parts are joined as in `node/parts.py`.
    """

    placer: Placer[Any] | None = None

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
        self.id = identity.node
        self.chance = chance
        self.skew_s = skew_s  # of its wall clock
        self.promises = Promises(self.clock)
        self.events = EventHub()
        self.events.listen(emit)
        self.emit = self.events.emit
        self.thread = SimThread()
        self.loader = Loader(machine, self.thread.spend)
        self.catalogue = cast(Catalogue, SimCatalogue(around.models))
        self.failed: list[BaseException] = []  # bugs: what parts of it died of
        self.up = asyncio.Event()
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._loop = asyncio.get_running_loop()
        self._following: asyncio.Task[None] | None = None

    # ---- life

    async def live(self) -> None:
        self._join_the_mesh()
        self._join_the_pipeline()
        self._count()
        async with AsyncExitStack() as stack:
            await self._start(stack)
            self.up.set()
            await self._loop.create_future()

    async def _start(self, stack: AsyncExitStack) -> None:
        await stack.enter_async_context(self.pipeline)
        await stack.enter_async_context(self.links)
        self.distances.addresses = self.links.addresses
        stack.push_async_callback(self._stop_tasks)
        await stack.enter_async_context(self.bus)
        self.start_task(self.membership.run())
        if self.around.surveys:
            self.start_task(self.surveyor.run())
        if self.machine.models:
            self._following = self.start_task(self._keep_serving())

    def clock(self) -> float:
        return self._loop.time()

    def wall_clock(self) -> float:
        return self.around.epoch_s + self.skew_s + self._loop.time()

    async def leave(self) -> None:
        """As Ctrl-C, once."""
        if self._following is not None:
            self._following.cancel()
        await leave(
            self.serving,
            self.pipeline,
            self.membership,
            patience_s=LEAVE_S,
            hurry=asyncio.Event(),
            emit=self.emit,
        )

    def start_task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks[task] = None
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.failed.append(error)

    async def _stop_tasks(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ---- parts

    def _join_the_mesh(self) -> None:
        around, identity, emit = self.around, self.identity, self.emit
        self.bus = SimBus(identity, around.mesh, around.relays, emit=emit, clock=self.wall_clock)
        self.membership = Membership(
            self.bus,
            identity,
            self.describe,
            emit=emit,
            clock=self.clock,
            wall_clock=self.wall_clock,
            chance=self.chance,
            config=around.membership,
        )
        self.neighbours = Neighbours(private=False, start=self.start_task)
        self.links = Links(
            identity,
            [around.network.carrier(identity)],
            resolve=self.neighbours.contact,
            admit=self.neighbours.admits,
            emit=emit,
            config=around.links,
        )
        self.neighbours.meet(self.membership, self.links)
        self.membership.on_doubt = self.neighbours.check
        self.membership.is_linked = self.links.is_connected
        view = self.membership.view
        self.distances = Distances(self.id, view.get, self.links.rtt, chance=self.chance)
        self.links.on_rtt(self.distances.learn)
        self.surveyor = Surveyor(
            self.id, view, self.links, self.distances.latency, chance=self.chance
        )

    def _join_the_pipeline(self) -> None:
        around, routing = self.around, self.around.routing
        routing = replace(routing, secret=self.chance.randbytes(16))
        self.router = Router(
            self.id,
            self.catalogue,
            self.offers,
            self.neighbours.doubtful,
            suspects=self.membership.doubtful,
            announcements=lambda: (self.describe(), *self.membership.view.announcements()),
            chooser=Chooser(self.distances.latency, self.clock, self.chance, routing),
        )
        self.pipeline = Pipeline(
            self.links,
            around.make_planner(self) if around.make_planner else self.router.plan,
            emit=self.emit,
            clock=self.clock,
            wall_clock=self.wall_clock,
            draw=self.chance.randbytes,
            on_load=self.router.on_load,
        )
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
        self.serving.load_with(self.loader.load)

    def _count(self) -> None:
        """What is asked for, and whether we hear enough of the mesh to give it."""
        names = [model.name for model in self.machine.models]
        needs = Needs(lambda: names, self.router.is_ready, self.clock)
        self.membership.needs_more = needs
        self.membership.on_change(needs.changed)
        self.demand = DemandMeter(self._model_id, self.clock)
        self.events.listen(self.demand.listen)
        self.events.listen(self._note_load)

    def _note_load(self, event: Event) -> None:
        if isinstance(event, PagesChanged):
            self.membership.load_changed()

    def _model_id(self, name: str) -> ModelId | None:
        known = self.around.models.get(name)
        return known.model_id if known else None

    # ---- what we say, and what is said

    def describe(self, sequence: int = 0) -> Announcement:
        return Announcement(
            card=self.identity.card,
            name=self.name,
            addresses=self.links.addresses,
            capability=self.machine.capability,
            stages=self.serving.offers(),
            gateway=self.machine.gateway,
            software=f"shoal {__version__}",
            sequence=sequence,
            sent_at=int(self.wall_clock()),
            offered_bytes=self.machine.memory_bytes if self.machine.models else 0,
            can_serve=tuple(model.model_id for model in self.machine.models),
            place=self.distances.place,
            demand=self.demand.announced(),
        )

    def offers(self) -> Iterator[tuple[NodeId, StageOffer]]:
        """Every stage that this node knows of, its own first."""
        for offer in self.serving.offers():
            yield self.id, offer
        yield from self.neighbours.offers()

    # ---- our own slice

    async def _keep_serving(self) -> None:
        machine = self.machine
        if machine.pinned is not None:
            await self.serve(machine.models[0].model_id, machine.pinned)
            return
        make = self.around.make_placer
        self.placer = make(self) if make else self.usual_placer()
        if self.placer is None:
            return
        self.membership.on_change(self.placer.changed)
        await asyncio.sleep(FIRST_VIEW_S)
        await self.placer.start()
        await self.placer.run()

    def usual_placer(self) -> Placer[Pool]:
        return Placer(
            self.pool,
            lambda pool: decide(self.id, pool),
            self,
            run_apart=call_here,
            clock=self.clock,
            chance=self.chance,
            config=self.around.placer,
        )

    def pool(self) -> Pool:
        """The mesh as placement sees it from here."""
        return pool_of(
            self.membership.ourselves(),
            self.promises.kept(self.membership.view.announcements()),
            [
                Candidate(each.model_id, each.shape, each.dtype, self.machine.reserve_tokens)
                for each in self.machine.models
            ],
        )

    # ---- what the placer asks of us

    def held(self) -> Holding | None:
        served = next(iter(self.serving.slices), None)
        return Holding(served.checkpoint.model_id, served.layers) if served else None

    def drain(self) -> None:
        self.serving.drain()

    def resume(self) -> None:
        self.serving.resume()

    async def vacate(self, patience_s: float) -> None:
        await self.serving.vacated(patience_s)

    async def serve(self, model: ModelId, layers: Slice) -> None:
        of = next(each for each in self.around.models.values() if each.model_id == model)
        pinned = self.machine.pinned is not None
        speed = self.machine.speed_of(of, layers)
        self.serving.stop()
        await self.serving.serve(cast("Checkpoint", of), layers, speed, pinned=pinned)


class SimCatalogue:
    """The twin of `Catalogue`: every node knows every model's vocabulary."""

    def __init__(self, models: Mapping[str, SimModel]) -> None:
        self._models = models

    def get(self, name: str) -> SimModel | None:
        return self._models.get(name)

    def tokenizer(self, checkpoint: SimModel) -> None:
        """Text is made of numbers here."""


async def call_here(function: Callable[[], T]) -> T:
    """In place of a thread."""
    return function()
