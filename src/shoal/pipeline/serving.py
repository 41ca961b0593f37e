"""The slices this node serves: has them loaded, puts them into service, says what it offers.

`offers()` is what the node announces about itself; `changed` is called whenever it would read
differently.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal, cast

from ..bus import StageOffer
from ..engine.batcher import Batcher, BatcherConfig
from ..engine.prefix import PrefixPool, UnsharedPool
from ..engine.served import Engine
from ..errors import InvalidRequest
from ..events import BackendChanged, Emit, StageChanged
from ..hardware import Speed
from ..models.checkpoint import Checkpoint
from ..models.gguf_checkpoint import GgufCheckpoint
from ..transport import Links
from ..units import ModelId, NodeId, Quant, Slice
from .fronted import FrontedWorker
from .fronted_sessions import FrontedSessions, Slots
from .loading import Compute, Load, Loaded, ServingConfig, compute_class, load, step_tokens
from .service import Pipeline
from .stage import StageSessions, StageSessionsConfig
from .stage_key import StageKey
from .worker import StageWorker

if TYPE_CHECKING:
    from ..engine.stage import Stage
    from ..engine.thread import EngineThread


@dataclass(frozen=True, slots=True)
class Served:
    """One slice of one model on this node. `worker` is None until it is in service."""

    checkpoint: Checkpoint
    layers: Slice
    compute: Compute
    state: Literal["joining", "serving", "draining"]
    speed: Speed
    pinned: bool
    worker: StageWorker | FrontedWorker | None = None


class Serving:
    """What this node computes, and what it tells the mesh about it."""

    def __init__(
        self,
        me: NodeId,
        pipeline: Pipeline,
        links: Links,
        thread: EngineThread,
        config: ServingConfig,
        *,
        emit: Emit,
        clock: Callable[[], float],
        changed: Callable[[], None],
    ) -> None:
        self._load: Load = load
        self._me, self._pipeline, self._links, self._thread = me, pipeline, links, thread
        self._config, self._emit, self._clock, self._changed = config, emit, clock, changed
        self._served: dict[str, Served] = {}  # by model id: one slice of a model a node

    @property
    def slices(self) -> list[Served]:
        return list(self._served.values())

    def load_with(self, load: Load) -> None:
        """Get slices from there from now on; the simulator's are not read from checkpoints."""
        self._load = load

    def compute_on(self, device: str, memory_bytes: int, history_bytes: int) -> None:
        """Where slices are loaded from now on, and what they may take there."""
        self._config = replace(
            self._config, device=device, memory_bytes=memory_bytes, history_bytes=history_bytes
        )

    async def serve(
        self,
        checkpoint: Checkpoint,
        layers: Slice,
        speed: Speed,
        *,
        pinned: bool,
        quant: Quant | None = None,
        dtype: str | None = None,
    ) -> None:
        """Load a slice and put it into service. `speed` is a guess until it is measured;
        `quant`, with `dtype`, stands in for the configured one.

        A slice of the same model that we held is given up first, since there is memory for one:
        see that it is `vacated`.
        Raises InvalidRequest for layers that the model does not have.
        """
        if layers.stop > checkpoint.layers:
            raise InvalidRequest(
                f"{checkpoint.name} has {checkpoint.layers} layers, not {layers.stop}",
                hint=f"--layers A:B, with B up to {checkpoint.layers}",
            )
        model = checkpoint.model_id
        if model in self._served:
            self._give_up(model)
        config = self._config
        if quant is not None:
            config = replace(config, quant=quant, dtype=dtype)
        compute = compute_class(checkpoint, config)
        self._put(Served(checkpoint, layers, compute, "joining", speed, pinned))
        try:
            loaded = await self._load(self._thread, checkpoint, layers, config, speed, self._clock)
        except BaseException:
            self._forget(model, "failed")
            raise
        worker = self._worker(checkpoint, layers, compute, loaded)
        if loaded.drafter is not None:
            worker.guess_with(loaded.drafter)
        self._pipeline.serve(worker)
        measured = loaded.meter.speed
        self._put(Served(checkpoint, layers, compute, "serving", measured, pinned, worker))

    async def front(self, checkpoint: Checkpoint, engine: Engine, slots: int) -> None:
        """Put the whole model into service, computed by `engine`, which was probed; `slots` 0 is as
        many as it says itself. Raises BackendFailed.
        """
        probed, usual = engine.probed, checkpoint.context_length
        places = Slots(slots or probed.slots, min(usual, probed.context or usual))
        seconds = await engine.token_seconds(self._clock)
        layers, model = checkpoint.whole, checkpoint.model_id
        worker = FrontedWorker(
            StageKey(model, "served", layers),
            FrontedSessions(
                self._me,
                checkpoint.vocab_size,
                places,
                engine.refuses,
                self._config.gateway_share,
            ),
            engine,
            links=self._links,
            clock=self._clock,
            changed=partial(self._backend_changed, model),
        )
        self._pipeline.serve(worker)
        measured = Speed(layer_s=seconds / len(layers))
        self._put(Served(checkpoint, layers, "served", "serving", measured, True, worker))
        self._emit(BackendChanged(model, engine.name, True))

    def _backend_changed(self, model: ModelId, answers: bool) -> None:
        """Its sessions were told already; the mesh is, by what we announce."""
        served = self._served.get(model)
        if served is None or not isinstance(served.worker, FrontedWorker):
            return
        self._put(replace(served, state="draining" if served.worker.draining else "serving"))
        self._emit(BackendChanged(model, served.worker.backend, answers))

    def drain(self) -> None:
        """Take no new sessions; those that run go on."""
        for served in self.slices:
            if served.worker is not None:
                served.worker.draining = True
            self._put(replace(served, state="draining"))

    def resume(self) -> None:
        """Take new sessions again."""
        for served in self.slices:
            if isinstance(served.worker, StageWorker) and served.worker.draining:
                served.worker.draining = False
                self._put(replace(served, state="serving"))

    async def vacated(self, patience_s: float) -> bool:
        """Hand all sessions over. Back once none is left here; False when that takes longer."""
        self._pipeline.hand_over()
        workers = [served.worker for served in self.slices if served.worker is not None]
        try:
            async with asyncio.timeout(patience_s):
                for worker in workers:
                    await worker.idle.wait()
        except TimeoutError:
            return False
        return True

    def stop(self) -> None:
        """What still runs here ends; gateways look elsewhere."""
        for model in list(self._served):
            self._give_up(model)

    def stages(self) -> list[tuple[StageOffer, StageWorker | FrontedWorker | None]]:
        return [(self._offer(served), served.worker) for served in self.slices]

    def offers(self) -> tuple[StageOffer, ...]:
        return tuple(self._offer(served) for served in self.slices)

    def _worker(
        self,
        checkpoint: Checkpoint,
        layers: Slice,
        compute: Compute,
        loaded: Loaded,
    ) -> StageWorker:
        stage = loaded.stage
        pool = UnsharedPool if isinstance(checkpoint, GgufCheckpoint) else PrefixPool
        sessions = StageSessions(
            me=self._me,
            first=layers.start == 0,
            last=layers.stop == checkpoint.layers,
            vocab_size=checkpoint.vocab_size,
            context_length=checkpoint.context_length,
            pool=pool(stage.config.pages, stage.config.page_size),
            make_sampler=loaded.samplers,
            config=self._sessions_config(cast("Stage", stage), compute),
            layers=layers,
        )
        return StageWorker(
            StageKey(checkpoint.model_id, compute, layers),
            sessions,
            cast("Stage", stage),  # a GgufStage has its surface
            thread=self._thread,
            links=self._links,
            emit=self._emit,
            clock=self._clock,
            batcher=Batcher(
                BatcherConfig(max_tokens=step_tokens(stage), any_cut=stage.model.exact),
                loaded.meter,
            ),
        )

    def _sessions_config(self, stage: Stage, compute: Compute) -> StageSessionsConfig:
        """A running state is one session's: nobody goes on from another's, and each has a slot."""
        usual = StageSessionsConfig()
        return StageSessionsConfig(
            gateway_share=self._config.gateway_share,
            history_bytes=self._config.history_bytes,
            window=getattr(stage, "window", None),
            share_prefixes=not stage.keeps_states,
            rewinds=not stage.keeps_states and compute != "gguf",  # llama.cpp knows ids, not pages
            max_sessions=stage.config.slots if stage.keeps_states else usual.max_sessions,
        )

    def _offer(self, served: Served) -> StageOffer:
        worker = served.worker
        sessions = worker.sessions if worker is not None else None
        return StageOffer(
            model=served.checkpoint.model_id,
            model_name=served.checkpoint.name,
            total_layers=served.checkpoint.layers,
            layers=served.layers,
            compute=served.compute,
            state=served.state,
            speed=worker.speed if isinstance(worker, StageWorker) else served.speed,
            sessions=len(sessions) - sessions.waiting if sessions is not None else 0,
            queue=sessions.waiting if sessions is not None else 0,
            free_tokens=sessions.pool.free_tokens if sessions is not None else 0,
            total_tokens=sessions.pool.total_tokens if sessions is not None else 0,
            context_length=served.checkpoint.context_length,
            pinned=served.pinned,
        )

    def _put(self, served: Served) -> None:
        self._served[served.checkpoint.model_id] = served
        self._emit(StageChanged(served.checkpoint.model_id, served.layers, served.state))
        self._changed()

    def _give_up(self, model: str) -> None:
        worker = self._served[model].worker
        if worker is not None:
            self._pipeline.stop(worker.key)
        self._forget(model, "left")

    def _forget(self, model: str, state: str) -> None:
        served = self._served.pop(model, None)
        if served is None:  # stopped while it was loading
            return
        self._emit(StageChanged(served.checkpoint.model_id, served.layers, state))
        self._changed()
