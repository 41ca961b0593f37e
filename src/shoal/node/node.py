"""One running member of a mesh."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, Self

import msgspec

from .. import __version__
from ..api import ApiServer, config_for_bind, create_app
from ..api.config import is_loopback
from ..bus import Announcement, StageOffer
from ..bus.lan import LanDiscovery
from ..bus.membership import Membership
from ..bus.nostr import NostrBus
from ..bus.relay import EmbeddedRelay
from ..config import parse_memory
from ..engine.served import Engine, EngineClient
from ..engine.thread import EngineThread
from ..errors import BackendFailed, BadConfig, LinkClosed, NoCapacity, ShoalError, UnsupportedModel
from ..events import BackendChanged, EventHub
from ..hardware import Speed, choose_device, detect, load_or_measure
from ..identity import Ticket, load_or_create
from ..models.catalogue import Catalogue
from ..models.checkpoint import BUILTIN, Checkpoint
from ..models.gguf_checkpoint import GgufCheckpoint
from ..pipeline import Pipeline, Serving, ServingConfig, import_engine
from ..telemetry import Metrics
from ..transport import Contact, Links, TlsCarrier, TlsConfig
from ..units import ModelId, NodeId, Quant, Slice
from . import report
from .backend import MeshBackend
from .choosing import choose, compute_as, fits_into
from .config import NodeConfig
from .fronting import BackendConfig, until_it_answers
from .router import Router

PUBLIC_SHARE = 0.75  # of our pages for one stranger: whoever comes next finds some
RELAY_PORT = 7471  # tried first, so that a ticket still holds after a restart
LEAVE_S = 10.0  # how long running sessions may take when we leave
RECONNECT_S = 2.0  # a lost neighbour is given so long before it counts as gone
SETTLE_S = 0.5  # between a change of the view and a move
GUESSED_BYTES_PER_S = 1e10  # memory bandwidth where it was not measured
FIRST_VIEW_S = 0.5  # what others announce arrives within this after the relays are connected


class Node:
    """`async with Node(config) as node:` joins the mesh; leaving the block says goodbye and frees
    everything.

    The API answers from the start; `wait_serving` returns once our own slice is in service.
    """

    def __init__(self, config: NodeConfig) -> None:
        self.config = config
        self.events = EventHub()
        self.started = time.monotonic()
        self._stack = AsyncExitStack()
        self._catalogue = Catalogue()
        self._doubtful: set[NodeId] = set()
        self._backend: EngineClient
        self._model: Checkpoint | None = None  # the one we serve, or mean to
        self._device = "cpu"
        self._inexact: ModelId | None = None  # a model that has no exact form
        self._chance = random.Random()
        self._view_changed = asyncio.Event()
        self._models_changed = asyncio.Event()
        self._serving_done: asyncio.Future[None]
        self._failed: asyncio.Future[None]

    # ---- life

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await self._start(stack)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._stack.aclose()

    async def _start(self, stack: AsyncExitStack) -> None:
        """Parts are started from the inside out, and so they end from the outside in."""
        loop = asyncio.get_running_loop()
        self._serving_done, self._failed = loop.create_future(), loop.create_future()
        config = self.config
        self.identity = load_or_create(config.folders.identity_file)
        self.name = config.name or self.identity.name
        self.capability = detect(gpus=False)  # the rest when torch is there
        self._offered_bytes = parse_memory(config.memory, self.capability.memory_bytes)
        self._thread = await stack.enter_async_context(EngineThread(config.threads or None))
        if config.backend is not None:
            self._backend = await stack.enter_async_context(EngineClient(config.backend.address))
        elif config.serve:  # seconds of work: begin at once
            importing = asyncio.ensure_future(self._thread.run(import_engine))
            stack.callback(importing.cancel)
            importing.add_done_callback(lambda done: done.cancelled() or done.exception())
        self.relay = await self._start_relay(stack)
        own = [self.relay_url] if self.relay_url else []
        relays = tuple(dict.fromkeys((*own, *config.relays)))
        self.bus = NostrBus(self.identity, config.mesh, relays, emit=self.events.emit)
        self.membership = Membership(
            self.bus,
            self.identity,
            self._describe,
            emit=self.events.emit,
            clock=time.monotonic,
            wall_clock=time.time,
            chance=self._chance,
        )
        self.membership.on_change(self._view_changed.set)
        self.membership.on_change(self._models_changed.set)
        await self._start_pipeline(stack)
        self._tasks = await stack.enter_async_context(_Background())
        await stack.enter_async_context(self.bus)
        await self._start_lan(stack)
        self._tasks.start(self.membership.run(), self._failed)
        self._tasks.start(self._open_announced_models(), self._failed)
        await self._start_api(stack)
        self._tasks.start(self._keep_serving(), self._failed)
        stack.push_async_callback(self._leave)

    async def _start_relay(self, stack: AsyncExitStack) -> EmbeddedRelay | None:
        """Ours runs when asked for, or when there is no other."""
        config = self.config
        if config.relays and config.relay_port is None:
            return None
        host = config.listen_host or "0.0.0.0"  # noqa: S104 - the mesh has to reach it
        kept = config.folders.relay_dir if config.relay_keep else None
        if config.relay_port is None:
            with contextlib.suppress(BadConfig):  # taken: another node runs on this machine
                usual = EmbeddedRelay(host=host, port=RELAY_PORT, database=kept)
                return await stack.enter_async_context(usual)
        return await stack.enter_async_context(
            EmbeddedRelay(host=host, port=config.relay_port or 0, database=kept)
        )

    async def _start_pipeline(self, stack: AsyncExitStack) -> None:
        config, emit = self.config, self.events.emit
        carrier = TlsCarrier(
            self.identity, TlsConfig(host=config.listen_host, port=config.listen_port)
        )
        self.links = Links(
            self.identity, [carrier], resolve=self._resolve, admit=self._admit, emit=emit
        )
        self.links.on_lost(self._on_lost)
        self.router = Router(
            self.identity.node, self._catalogue, self._offers, lambda: frozenset(self._doubtful)
        )
        self.pipeline = Pipeline(self.links, self.router.plan, emit=emit, clock=time.monotonic)
        self.metrics = Metrics()
        self.events.listen(self.metrics.listen)
        await stack.enter_async_context(self.pipeline)
        await stack.enter_async_context(self.links)
        self.serving = Serving(
            self.identity.node,
            self.pipeline,
            self.links,
            self._thread,
            self._serving_config(),
            emit=emit,
            clock=time.monotonic,
            changed=self.membership.changed,
        )

    def _serving_config(self, quant: Quant = "none", dtype: str | None = None) -> ServingConfig:
        config = self.config
        return ServingConfig(
            memory_bytes=self._offered_bytes,
            kv_tokens=config.kv_tokens,
            dtype=dtype,
            quant=quant,
            device=self._device,
            draft=config.draft,
            tune_threads=not config.threads,
            proofs_dir=config.folders.proofs_dir,
            scratch_dir=config.folders.scratch_dir,
            gateway_share=1.0 if config.mesh.is_private else PUBLIC_SHARE,
        )

    async def _start_lan(self, stack: AsyncExitStack) -> None:
        if not self.config.lan:
            return
        port = self.relay.port if self.relay else 0
        host = self.config.listen_host
        found = LanDiscovery(
            self.identity.node,
            self.config.mesh,
            lambda url: self._tasks.start(self.bus.add_relay(url), None),
            port=port,
            interfaces=[host] if is_loopback(host) else None,
        )
        await stack.enter_async_context(found)

    async def _start_api(self, stack: AsyncExitStack) -> None:
        config = self.config
        backend = MeshBackend(
            self.router,
            self.pipeline.gateway,
            started_at=int(time.time()),
            is_loading=lambda: not self._serving_done.done(),
            status=lambda ticket: self.status(ticket=ticket),
            mesh=self.mesh,
        )
        app = create_app(
            backend, config_for_bind(config.api_host, config.api_key or None), self.metrics.render
        )
        self.api = await stack.enter_async_context(ApiServer(app, config.api_host, config.api_port))
        runtime = config.folders.runtime_file
        runtime.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        runtime.write_bytes(msgspec.json.encode({"pid": os.getpid(), "api": self.api_url}))
        stack.callback(runtime.unlink, missing_ok=True)

    async def _leave(self) -> None:
        """Goodbye first, so that nobody plans with us; then what runs here may end in peace: the
        sessions on our stages and the answers of our own clients.
        """
        self.serving.drain()
        with contextlib.suppress(ShoalError):
            await self.membership.leave()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_S):
                await self.pipeline.idle()
        self.serving.stop()

    # ---- what a caller may ask

    @property
    def api_url(self) -> str:
        return self.api.url

    @property
    def relay_url(self) -> str | None:
        """Of the embedded relay, as this machine reaches it."""
        return self.relay.url if self.relay else None

    def ticket(self) -> Ticket:
        """What another machine needs to join."""
        mesh = self.config.mesh
        relays = list(self.config.relays)
        if self.relay is not None:
            hosts = [address.rpartition(":")[0] for address in self.links.addresses]
            relays += [f"ws://{host}:{self.relay.port}" for host in hosts]
        return Ticket(
            mesh=mesh.name,
            secret=mesh.secret,
            relays=tuple(relays[:8]),
            addresses=self.links.addresses[:16],
        )

    async def wait_serving(self) -> None:
        """Back once our slice is in service (at once without one). Raises what prevented it."""
        await asyncio.shield(self._serving_done)

    async def run_until(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set. Raises what a part of the node died of."""
        stopping = asyncio.create_task(stop.wait())
        self._failed.add_done_callback(lambda _: stopping.cancel())
        try:
            await stopping
        except asyncio.CancelledError:
            if not self._failed.done():
                raise
            self._failed.result()

    def status(self, *, ticket: bool = False) -> dict[str, Any]:
        """What `shoal status` shows; the ticket, which lets others in, only when asked for."""
        config = self.config
        return {
            "node": self.identity.node,
            "name": self.name,
            "version": __version__,
            "uptime_s": round(time.monotonic() - self.started, 1),
            "mesh": {"label": config.mesh.label, "private": config.mesh.is_private},
            "relays": [report.plain(relay) for relay in self.bus.status()],
            "addresses": list(self.links.addresses),
            "capability": report.plain(self.capability),
            "stages": [
                report.stage_report(offer, worker) for offer, worker in self.serving.stages()
            ],
            "links": [{"node": node, "name": self._name_of(node)} for node in self.links.peers()],
            "faults": {node or "unproven": count for node, count in self.links.faults.items()},
            "announcements_dropped": dict(self.bus.dropped),
            "ticket": self.ticket().encode() if ticket else None,
        }

    def mesh(self) -> dict[str, Any]:
        me, now = self.identity.node, time.monotonic()
        seen = [(self._describe(0), now), *self.membership.view.nodes.values()]
        return {
            "nodes": [report.node_report(each, me=me, age_s=now - at) for each, at in seen],
            "models": report.model_reports([each for each, _ in seen]),
        }

    def _name_of(self, node: NodeId) -> str:
        known = self.membership.view.get(node)
        return known.name if known else node

    # ---- the mesh around us

    def _describe(self, sequence: int) -> Announcement:
        return Announcement(
            card=self.identity.card,
            name=self.name,
            addresses=self.links.addresses,
            capability=self.capability,
            stages=self.serving.offers(),
            gateway=True,
            software=f"shoal {__version__}",
            sequence=sequence,
            sent_at=int(time.time()),
            offered_bytes=self._offered_bytes if self._computes else 0,
            can_serve=(self._model.model_id,) if self._model else (),
        )

    @property
    def _computes(self) -> bool:
        """Slices: behind an engine of another make there is nothing left for them."""
        return self.config.serve and self.config.backend is None

    def _offers(self) -> Iterator[tuple[NodeId, StageOffer]]:
        for offer in self.serving.offers():
            yield self.identity.node, offer
        for announcement in self.membership.view.announcements():
            for offer in announcement.stages:
                yield announcement.node, offer

    def _resolve(self, node: NodeId) -> Contact | None:
        known = self.membership.view.get(node)
        return Contact(node, known.card.transport_key, known.addresses) if known else None

    def _admit(self, node: NodeId) -> bool:
        """Anyone may knock at a public mesh's node; a private one knows its members by their
        announcements.
        """
        return not self.config.mesh.is_private or self.membership.view.get(node) is not None

    def _on_lost(self, node: NodeId, reason: str) -> None:
        """No new session is planned through a lost neighbour until it is reached again."""
        self._doubtful.add(node)
        self._tasks.start(self._reconnect(node), None)

    async def _reconnect(self, node: NodeId) -> None:
        try:
            async with asyncio.timeout(RECONNECT_S):
                await self.links.connect(node)
        except (LinkClosed, TimeoutError):
            self.membership.suspect(node)
        self._doubtful.discard(node)

    # ---- our own slice

    async def _keep_serving(self) -> None:
        """Serve what the user or the mesh wants, and follow the mesh as it changes."""
        try:
            if self.config.serve:
                await self._serve_first()
        except asyncio.CancelledError:
            self._serving_done.cancel()
            raise
        except BaseException as error:
            self._serving_done.set_exception(error)
            self._serving_done.exception()  # whoever waits gets it; without a waiter it is no news
            raise
        self._serving_done.set_result(None)
        config = self.config
        if config.serve and config.layers is None and config.backend is None:
            await self._follow_the_mesh()

    async def _front(self, backend: BackendConfig) -> None:
        """Put the engine behind us into service, as soon as it answers."""
        add = self._catalogue.add_without_weights
        self._model = await asyncio.to_thread(add, self.config.model)
        tokenizer = self._catalogue.tokenizer(self._model)
        names = backend.names(self._model)
        engine = Engine(self._backend, tokenizer, names, exactly=bool(backend.model))
        model = self._model.model_id

        def told(error: BackendFailed) -> None:
            self.events.emit(BackendChanged(model, error.message, False))

        while not self.serving.slices:
            await until_it_answers(engine, told)
            with contextlib.suppress(BackendFailed):  # gone again: wait anew
                await self.serving.front(self._model, engine, backend.slots)

    async def _serve_first(self) -> None:
        config = self.config
        if config.backend is not None:
            await self._front(config.backend)
            return
        await self._look_around(gpus=config.device != "cpu")
        if config.model:
            self._model = await asyncio.to_thread(self._catalogue.add, config.model)
            await self._choose_device(self._model)
        if config.layers is None and self.bus.urls:
            self.membership.changed()  # say what we could serve, and hear what the others do
            await asyncio.sleep(FIRST_VIEW_S)
        if self._model is None:
            names = self.router.model_names() or [BUILTIN]
            self._model = await asyncio.to_thread(self._first_known, names)
        if self._model is None:
            return
        await self._choose_device(self._model)
        layers = config.layers or await self._choice(self._model)
        if layers is None:
            raise NoCapacity(
                f"not one layer of {self._model.name} fits into {config.memory} of this machine",
                hint="allow more with --memory 80%, or take a smaller model with --model",
            )
        await self._serve(self._model, layers)

    async def _look_around(self, *, gpus: bool) -> None:
        """A pinned slice needs no figures to be chosen by: it starts at once."""
        if self.config.layers is None:
            measured = self.config.folders.capability_file
            self.capability = await self._thread.run(load_or_measure, measured, gpus=gpus)
        else:
            self.capability = await self._thread.run(detect, gpus=gpus)

    async def _choose_device(self, model: Checkpoint) -> None:
        """Where slices of this model are computed: the memory that we offer is that device's."""
        config, found = self.config, self.capability
        as_what = self._serving_config(*self._compute_as(model))
        fits = partial(fits_into, model, config.layers, as_what, config.memory)
        wish = "cpu" if isinstance(model, GgufCheckpoint) else config.device
        device = choose_device(wish, found, fits)
        if device.name == "cpu" and found.devices[:-1]:  # what we tell of a GPU would be no use
            await self._look_around(gpus=False)
        self._offered_bytes = parse_memory(config.memory, device.memory_bytes)
        self._device = device.name
        self.serving.compute_on(device.name, self._offered_bytes)

    def _first_known(self, names: Sequence[str]) -> Checkpoint | None:
        return next(filter(None, map(self._catalogue.known, names)), None)

    async def _open_announced_models(self) -> None:
        """What the mesh serves and we have the files of: a gateway needs their tokenizers."""
        while True:
            await self._models_changed.wait()
            self._models_changed.clear()
            for name in self.router.model_names():
                await asyncio.to_thread(self._catalogue.known, name)

    def models_not_here(self) -> list[str]:
        """What the mesh serves and this machine lacks the files of: it can neither help nor ask."""
        return [name for name in self.router.model_names() if not self._catalogue.get(name)]

    async def _choice(self, model: Checkpoint) -> Slice | None:
        """By the view of now; off the event loop, since a plan may take a tenth of a second."""
        me, others = self._describe(0), self.membership.view.announcements()
        config = self._serving_config(*self._compute_as(model))
        return await asyncio.to_thread(choose, model, me, others, config)

    def _compute_as(self, model: Checkpoint) -> tuple[Quant, str | None]:
        if self._inexact == model.model_id:
            return "none", None
        others = self.membership.view.announcements()
        return compute_as(self.config.quant, self.config.dtype, model, others)

    async def _serve(self, checkpoint: Checkpoint, layers: Slice) -> None:
        rate = self.capability.memory_bytes_per_s or GUESSED_BYTES_PER_S
        guess = Speed(layer_s=max(checkpoint.layer_bytes) / rate)
        pinned = self.config.layers is not None
        quant, dtype = self._compute_as(checkpoint)
        try:
            await self.serving.serve(
                checkpoint, layers, guess, pinned=pinned, quant=quant, dtype=dtype
            )
        except UnsupportedModel:
            if self.config.quant != "auto" or quant == "none":
                raise
            self._inexact = checkpoint.model_id  # all nodes find the same
            await self.serving.serve(checkpoint, layers, guess, pinned=pinned, quant="none")

    async def _follow_the_mesh(self) -> None:
        """Move when the mesh has a hole that we can fill; a wait lets the view settle first."""
        useless: set[Slice] = set()  # could not be loaded: trying again would not help
        while True:
            await self._view_changed.wait()
            self._view_changed.clear()  # here, so that what changes while we load is not missed
            await asyncio.sleep(SETTLE_S * self._chance.uniform(1, 2))
            if self._model is None:
                continue
            layers, held = await self._choice(self._model), self.serving.slices
            if layers is None or layers in useless or (held and held[0].layers == layers):
                continue
            try:
                await self._serve(self._model, layers)
            except ShoalError:  # told as an event
                useless.add(layers)


class _Background:
    """Tasks of the node that run beside everything else. Leaving the block cancels them."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def start(self, work: Coroutine[None, None, None], failed: asyncio.Future[None] | None) -> None:
        """Run `work`; what it raises is put into `failed`, for whoever runs the node, or is no
        news without one. Once the block is left, nothing is started any more.
        """
        if self._closed:
            work.close()
            return
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(partial(self._done, failed))

    def _done(self, failed: asyncio.Future[None] | None, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if failed is not None and not failed.done():
            failed.set_exception(error)
            failed.exception()
