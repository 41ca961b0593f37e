"""One running member of a mesh."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import AsyncExitStack
from typing import Any, Self

import msgspec

from .. import __version__
from ..api import ApiServer, config_for_bind, create_app
from ..engine.served import EngineClient
from ..engine.thread import EngineThread
from ..events import EventHub
from ..identity import Identity, Ticket, load_or_create
from ..pipeline import import_engine
from . import report
from .backend import MeshBackend
from .background import Background
from .config import NodeConfig
from .leaving import leave
from .machine import Machine
from .meeting import Meeting
from .parts import Parts
from .waking import watch


class Node:
    """`async with Node(config) as node:` joins the mesh; leaving the block hands over what runs
    here, says goodbye and frees everything.

    The API answers from the start; `wait_serving` returns once our own slice is in service.
    """

    identity: Identity
    api: ApiServer

    def __init__(self, config: NodeConfig) -> None:
        self.config = config
        self.events = EventHub()
        self.started = time.monotonic()
        self.hurry = asyncio.Event()  # set it, and leaving waits for nothing
        self.leaving = False
        self._stack = AsyncExitStack()
        self._tasks = Background()
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
        self._thread = await stack.enter_async_context(EngineThread(config.threads or None))
        self.machine = Machine(config, self._thread)
        backend = await self._start_backend(stack)
        self.meeting = Meeting(config)
        await self.meeting.open(stack)
        self.parts = parts = Parts(
            config,
            self.identity,
            self.machine,
            self._thread,
            self.meeting,
            self.events,
            self._tasks.start,
        )
        self.name = parts.name
        parts.membership.on_change(self._models_changed.set)
        await stack.enter_async_context(parts.pipeline)
        await stack.enter_async_context(parts.links)
        parts.distances.addresses = parts.links.addresses
        await stack.enter_async_context(self._tasks)
        await stack.enter_async_context(parts.bus)
        await self.meeting.search(stack, self.identity.node, self._found_relay)
        self._tasks.start(parts.membership.run(), self._failed)
        self._tasks.start(parts.surveyor.run(), self._failed)
        self._tasks.start(self._open_announced_models(), self._failed)
        self._tasks.start(watch(time.monotonic, time.time, self._woke), self._failed)
        await self._start_api(stack)
        serving = self._tasks.start(self._keep_serving(backend), self._failed)
        stack.push_async_callback(self._leave, serving)

    async def _start_backend(self, stack: AsyncExitStack) -> EngineClient | None:
        if self.config.backend is not None:
            return await stack.enter_async_context(EngineClient(self.config.backend.address))
        if self.config.serve:  # seconds of work: begin at once
            importing = asyncio.ensure_future(self._thread.run(import_engine))
            stack.callback(importing.cancel)
            importing.add_done_callback(lambda done: done.cancelled() or done.exception())
        return None

    async def _start_api(self, stack: AsyncExitStack) -> None:
        config = self.config
        backend = MeshBackend(
            self.parts.router,
            self.parts.pipeline.gateway,
            started_at=int(time.time()),
            is_loading=lambda: not self._serving_done.done(),
            is_leaving=lambda: self.leaving,
            status=lambda ticket: self.status(ticket=ticket),
            mesh=self.mesh,
        )
        metrics = self.parts.metrics.render
        app = create_app(backend, config_for_bind(config.api_host, config.api_key or None), metrics)
        self.api = await stack.enter_async_context(ApiServer(app, config.api_host, config.api_port))
        runtime = config.folders.runtime_file
        runtime.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        runtime.write_bytes(msgspec.json.encode({"pid": os.getpid(), "api": self.api_url}))
        stack.callback(runtime.unlink, missing_ok=True)

    async def _keep_serving(self, backend: EngineClient | None) -> None:
        """Serve what the user or the mesh wants, and follow the mesh as it changes."""
        try:
            if self.config.serve:
                await self.parts.slices.start(backend)
        except asyncio.CancelledError:
            self._serving_done.cancel()
            raise
        except BaseException as error:
            self._serving_done.set_exception(error)
            self._serving_done.exception()  # whoever waits gets it; without a waiter it is no news
            raise
        self._serving_done.set_result(None)
        await self.parts.slices.follow()

    async def _leave(self, following: asyncio.Task[None] | None) -> None:
        self.leaving = True
        if following is not None:  # no more moves
            following.cancel()
            await asyncio.wait((following,))
        await leave(
            self.parts.serving,
            self.parts.pipeline,
            self.parts.membership,
            patience_s=self.config.leave_s,
            hurry=self.hurry,
            emit=self.events.emit,
        )

    # ---- what happens around us

    def _found_relay(self, url: str) -> None:
        self._tasks.start(self.parts.bus.add_relay(url))

    async def _open_announced_models(self) -> None:
        """What the mesh serves and we have the files of: a gateway needs their tokenizers, and a
        node may come to serve them.
        """
        catalogue = self.parts.catalogue
        while True:
            await self._models_changed.wait()
            self._models_changed.clear()
            new = [name for name in self.parts.router.model_names() if not catalogue.get(name)]
            if any([await asyncio.to_thread(catalogue.known, name) for name in new]):
                self.parts.membership.changed()
                self.parts.slices.placer.changed()

    def _woke(self) -> None:
        """This machine slept: the others may have given us up, and much may have changed."""
        self.parts.membership.changed()
        self.parts.slices.placer.changed()

    # ---- what a caller may ask

    @property
    def api_url(self) -> str:
        return self.api.url

    @property
    def relay_url(self) -> str | None:
        """Of the embedded relay, as this machine reaches it."""
        return self.meeting.relay_url

    def ticket(self) -> Ticket:
        """What another machine needs to join."""
        return self.meeting.ticket(self.parts.links.addresses)

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

    def models_not_here(self) -> list[str]:
        """What the mesh serves and this machine lacks the files of: it can neither help nor ask."""
        names = self.parts.router.model_names()
        return [name for name in names if not self.parts.catalogue.get(name)]

    def status(self, *, ticket: bool = False) -> dict[str, Any]:
        """What `shoal status` shows; the ticket, which lets others in, only when asked for."""
        config, parts = self.config, self.parts
        links, neighbours = parts.links, parts.neighbours
        decision = parts.slices.placer.decision
        return {
            "node": self.identity.node,
            "name": self.name,
            "version": __version__,
            "pid": os.getpid(),
            "uptime_s": round(time.monotonic() - self.started, 1),
            "leaving": self.leaving,
            "answers": len(parts.pipeline.gateway),
            "placement": decision.reason if decision else "",
            "mesh": {"label": config.mesh.label, "private": config.mesh.is_private},
            "relays": [report.plain(relay) for relay in parts.bus.status()],
            "clock_behind_s": round(parts.bus.offset_s, 1),
            "addresses": list(links.addresses),
            "capability": report.plain(self.machine.capability),
            "stages": [
                report.stage_report(offer, worker) for offer, worker in parts.serving.stages()
            ],
            "links": [{"node": node, "name": neighbours.name(node)} for node in links.peers()],
            "faults": {node or "unproven": count for node, count in links.faults.items()},
            "announcements_dropped": dict(parts.bus.dropped),
            "ticket": self.ticket().encode() if ticket else None,
        }

    def mesh(self) -> dict[str, Any]:
        me, now = self.identity.node, time.monotonic()
        seen = [(self.parts.describe(0), now), *self.parts.membership.view.nodes.values()]
        return {
            "nodes": [report.node_report(each, me=me, age_s=now - at) for each, at in seen],
            "models": report.model_reports(
                [each for each, _ in seen], me, self.parts.distances.latency
            ),
        }
