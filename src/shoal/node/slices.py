"""What this node computes: the slice that its user pinned, what the mesh needs of it, or all of a
model through an engine of another make.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..bus import Announcement
from ..engine.served import Engine, EngineClient
from ..errors import BackendFailed, NoCapacity, UnsupportedModel
from ..events import BackendChanged, Emit
from ..models.catalogue import Catalogue
from ..models.checkpoint import BUILTIN, Checkpoint
from ..pipeline import Serving
from ..placement import Decision, capacities, decide
from ..placement.cost import predict
from ..units import ModelId, NodeId, Quant, Slice
from .choosing import Candidate, candidate, compute_as, pool_of
from .config import NodeConfig
from .fronting import BackendConfig, until_it_answers
from .machine import Machine
from .placing import Holding, Placer
from .promises import Promises

FIRST_VIEW_S = 0.5  # what others announce arrives within this after the relays are connected


@dataclass(kw_only=True, frozen=True, slots=True)
class Around:
    """What the mesh looks like from here, each by a call."""

    me: Callable[[], Announcement]  # as we would announce ourselves now
    others: Callable[[], Sequence[Announcement]]
    models: Callable[[], Sequence[str]]  # names of those that somebody serves
    announce: Callable[[], None]  # something about us has changed


@dataclass(frozen=True, slots=True)
class View:
    """What a decision is made of; the sums over it may take a while, and are not done here."""

    me: Announcement
    others: Sequence[Announcement]
    models: Sequence[Checkpoint]


class Slices:
    """`run` it in a task. The placer sees it as its `Stages`."""

    def __init__(
        self,
        config: NodeConfig,
        machine: Machine,
        catalogue: Catalogue,
        serving: Serving,
        around: Around,
        *,
        emit: Emit,
        clock: Callable[[], float],
        chance: random.Random,
    ) -> None:
        self._config, self._machine, self._catalogue = config, machine, catalogue
        self._serving, self._around, self._emit = serving, around, emit
        self._model: Checkpoint | None = None  # the one we serve, or mean to
        self._promises = Promises(clock)
        self._inexact: set[ModelId] = set()  # models that have no exact form
        self.placer: Placer[View] = Placer(
            self._view, self._decide, self, run_apart=asyncio.to_thread, clock=clock, chance=chance
        )

    # ---- for whoever runs the node

    @property
    def computes(self) -> bool:
        """Slices: behind an engine of another make there is nothing left for them."""
        return self._config.serve and self._config.backend is None

    def names(self) -> list[str]:
        """Of the models that this node holds layers of, or means to."""
        return [model.name for model in self._models()]

    def can_serve(self) -> tuple[ModelId, ...]:
        return tuple(model.model_id for model in self._models())

    async def start(self, backend: EngineClient | None) -> None:
        """Back once our slice is in service, if there is one for us. Raises what prevented it."""
        config = self._config
        if backend is not None and config.backend is not None:
            await self._front(backend, config.backend)
            return
        await self._machine.look_around(gpus=config.device != "cpu")
        if config.model:
            self._model = await asyncio.to_thread(self._catalogue.add, config.model)
            await self._choose_device(self._model)
        if config.layers is None:
            self._around.announce()  # say what we could serve, and hear what the others do
            await asyncio.sleep(FIRST_VIEW_S)
        if self._model is None:
            names = self._around.models() or [BUILTIN]
            self._model = await asyncio.to_thread(self._first_known, names)
        if self._model is not None:
            await self._serve_first(self._model)

    async def follow(self) -> None:
        """What the mesh needs, as it changes: forever."""
        if self.computes and self._config.layers is None:
            await self.placer.run()

    async def _serve_first(self, model: Checkpoint) -> None:
        await self._choose_device(model)
        if self._config.layers is not None:
            await self._load(model, self._config.layers)
        elif not await self.placer.start() and not await asyncio.to_thread(self._fits, model):
            raise NoCapacity(
                f"not one layer of {model.name} fits into {self._config.memory} of this machine",
                hint="allow more with --memory 80%, or take a smaller model with --model",
            )

    def _first_known(self, names: Sequence[str]) -> Checkpoint | None:
        return next(filter(None, map(self._catalogue.known, names)), None)

    async def _front(self, client: EngineClient, backend: BackendConfig) -> None:
        """Put the engine behind us into service, as soon as it answers."""
        add = self._catalogue.add_without_weights
        self._model = model = await asyncio.to_thread(add, self._config.model)
        names = backend.names(model)
        exactly = bool(backend.model)
        engine = Engine(client, self._catalogue.tokenizer(model), names, exactly=exactly)

        def told(error: BackendFailed) -> None:
            self._emit(BackendChanged(model.model_id, error.message, False))

        while not self._serving.slices:
            await until_it_answers(engine, told)
            with contextlib.suppress(BackendFailed):  # gone again: wait anew
                await self._serving.front(model, engine, backend.slots)

    # ---- what to hold

    def _models(self) -> list[Checkpoint]:
        """Those that we would serve, by name: the one that our user named, else all that are asked
        for somewhere and are on this machine.
        """
        if self._config.model or self._model is None:
            return [self._model] if self._model else []
        found = {self._model.model_id: self._model}
        for name in self._around.models():
            if known := self._catalogue.get(name):
                found.setdefault(known.model_id, known)
        return sorted(found.values(), key=lambda model: model.name)

    def _view(self) -> View:
        others = self._promises.kept(self._around.others())
        return View(self._around.me(), others, self._models())

    def _decide(self, view: View) -> Decision:
        candidates = [self._candidate(model, view.others) for model in view.models]
        return decide(NodeId(view.me.node), pool_of(view.me, view.others, candidates))

    def _candidate(self, model: Checkpoint, others: Sequence[Announcement]) -> Candidate:
        return candidate(model, self._machine.serving_config(*self._compute_as(model, others)))

    def _fits(self, model: Checkpoint) -> bool:
        """Any layer at all."""
        wanted = self._candidate(model, self._around.others())
        room = capacities(wanted.shape, self._machine.offered_bytes, wanted.kv_tokens)
        return max(room.middle, room.embedding, room.head, room.both) > 0

    def _compute_as(
        self, model: Checkpoint, others: Sequence[Announcement]
    ) -> tuple[Quant, str | None]:
        if model.model_id in self._inexact:
            return "none", None
        return compute_as(self._config.quant, self._config.dtype, model, others)

    async def _choose_device(self, model: Checkpoint) -> None:
        compute = self._compute_as(model, self._around.others())
        await self._machine.choose_device(model, *compute)

    # ---- what the placer asks of us

    def held(self) -> Holding | None:
        served = next(iter(self._serving.slices), None)
        return Holding(served.checkpoint.model_id, served.layers) if served else None

    def drain(self) -> None:
        self._serving.drain()

    def resume(self) -> None:
        self._serving.resume()

    async def vacate(self, patience_s: float) -> None:
        await self._serving.vacated(patience_s)

    async def serve(self, model: ModelId, layers: Slice) -> None:
        checkpoint = next(each for each in self._models() if each.model_id == model)
        if self._model is not checkpoint:
            self._model = checkpoint
            await self._choose_device(checkpoint)
        self._serving.stop()  # there is memory for one
        await self._load(checkpoint, layers)

    async def _load(self, checkpoint: Checkpoint, layers: Slice) -> None:
        others = self._around.others()
        quant, dtype = self._compute_as(checkpoint, others)
        expected = self._candidate(checkpoint, others)
        guess = predict(self._machine.capability, expected.shape, expected.compute, layers)
        pinned = self._config.layers is not None
        try:
            await self._serving.serve(
                checkpoint, layers, guess, pinned=pinned, quant=quant, dtype=dtype
            )
        except UnsupportedModel:
            if self._config.quant != "auto" or quant == "none":
                raise
            self._inexact.add(checkpoint.model_id)  # all nodes find the same
            await self._serving.serve(checkpoint, layers, guess, pinned=pinned, quant="none")
