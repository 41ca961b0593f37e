"""The parts of a node, each handed what it needs of the others. Nothing runs yet."""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Callable, Coroutine, Iterator

from .. import __version__
from ..bus import Announcement, StageOffer
from ..bus.membership import Membership
from ..bus.nostr import NostrBus
from ..engine.thread import EngineThread
from ..events import Event, EventHub, PagesChanged
from ..identity import Identity
from ..models.catalogue import Catalogue
from ..pipeline import Pipeline, Serving
from ..telemetry import Metrics
from ..transport import Links, TlsCarrier, TlsConfig
from ..units import ModelId, NodeId
from .config import NodeConfig
from .demand import DemandMeter
from .distances import Distances
from .machine import Machine
from .meeting import Meeting
from .needs import Needs
from .neighbours import Neighbours
from .router import Router
from .routing import Chooser, RoutingConfig
from .slices import Around, Slices
from .survey import Surveyor


class Parts:
    """`start` runs a task beside everything else."""

    def __init__(
        self,
        config: NodeConfig,
        identity: Identity,
        machine: Machine,
        thread: EngineThread,
        meeting: Meeting,
        events: EventHub,
        start: Callable[[Coroutine[None, None, None]], object],
    ) -> None:
        self.config, self.identity, self.machine = config, identity, machine
        self.name = config.name or identity.name
        self.catalogue = Catalogue()
        self._chance = random.Random()
        self._join_the_mesh(meeting, events, start)
        self._join_the_pipeline(thread, events)
        self._follow_the_mesh(events)

    def _join_the_mesh(
        self,
        meeting: Meeting,
        events: EventHub,
        start: Callable[[Coroutine[None, None, None]], object],
    ) -> None:
        """Who else is there, how they are reached, how far away they are."""
        config, emit = self.config, events.emit
        self.bus = NostrBus(self.identity, config.mesh, meeting.urls, emit=emit)
        self.membership = Membership(
            self.bus,
            self.identity,
            self.describe,
            emit=emit,
            clock=time.monotonic,
            wall_clock=time.time,
            chance=self._chance,
        )
        self.neighbours = Neighbours(private=config.mesh.is_private, start=start)
        tls = TlsConfig(host=config.listen_host, port=config.listen_port)
        self.links = Links(
            self.identity,
            [TlsCarrier(self.identity, tls)],
            resolve=self.neighbours.contact,
            admit=self.neighbours.admits,
            emit=emit,
        )
        self.neighbours.meet(self.membership, self.links)
        self.membership.on_doubt = self.neighbours.check
        self.membership.is_linked = self.links.is_connected
        self.distances = Distances(
            self.identity.node, self.membership.view.get, self.links.rtt, chance=self._chance
        )
        self.links.on_rtt(self.distances.learn)
        self.surveyor = Surveyor(
            self.identity.node,
            self.membership.view,
            self.links,
            self.distances.latency,
            chance=self._chance,
        )

    def _join_the_pipeline(self, thread: EngineThread, events: EventHub) -> None:
        """Routes, sessions, and the stages of this node."""
        emit, me = events.emit, self.identity.node
        routing = RoutingConfig(mode=self.config.routing, secret=secrets.token_bytes(16))
        self.router = Router(
            me,
            self.catalogue,
            self.offers,
            self.neighbours.doubtful,
            suspects=self.membership.doubtful,
            announcements=lambda: (self.describe(0), *self.membership.view.announcements()),
            chooser=Chooser(self.distances.latency, time.monotonic, self._chance, routing),
        )
        self.pipeline = Pipeline(
            self.links,
            self.router.plan,
            emit=emit,
            clock=time.monotonic,
            on_load=self.router.on_load,
        )
        self.serving = Serving(
            me,
            self.pipeline,
            self.links,
            thread,
            self.machine.serving_config(),
            emit=emit,
            clock=time.monotonic,
            changed=self.membership.changed,
        )
        self.machine.compute_on = self.serving.compute_on

    def _follow_the_mesh(self, events: EventHub) -> None:
        """Which slices, for whom; and what is counted on the way."""
        view = self.membership.view
        around = Around(
            me=self.membership.ourselves,
            others=view.announcements,
            models=self.router.model_names,
            announce=self.membership.changed,
        )
        self.slices = Slices(
            self.config,
            self.machine,
            self.catalogue,
            self.serving,
            around,
            emit=events.emit,
            clock=time.monotonic,
            chance=self._chance,
        )
        needs = Needs(self.slices.names, self.router.is_ready, time.monotonic)
        self.membership.needs_more = needs
        self.membership.on_change(needs.changed)
        self.membership.on_change(self.slices.placer.changed)
        self.demand = DemandMeter(self._model_id, time.monotonic)
        self.metrics = Metrics()
        events.listen(self._note_load)
        events.listen(self.demand.listen)
        events.listen(self.metrics.listen)

    # ---- what we say, and what is said

    def describe(self, sequence: int) -> Announcement:
        return Announcement(
            card=self.identity.card,
            name=self.name,
            addresses=self.links.addresses,
            capability=self.machine.capability,
            stages=self.serving.offers(),
            gateway=True,
            software=f"shoal {__version__}",
            sequence=sequence,
            sent_at=int(time.time()),
            offered_bytes=self.machine.offered_bytes if self.slices.computes else 0,
            can_serve=self.slices.can_serve(),
            place=self.distances.place,
            demand=self.demand.announced(),
        )

    def offers(self) -> Iterator[tuple[NodeId, StageOffer]]:
        """Every stage that is announced, our own first."""
        for offer in self.serving.offers():
            yield self.identity.node, offer
        yield from self.neighbours.offers()

    def _note_load(self, event: Event) -> None:
        if isinstance(event, PagesChanged):
            self.membership.load_changed()

    def _model_id(self, name: str) -> ModelId | None:
        known = self.catalogue.get(name)
        return known.model_id if known else None
