"""The slices this node serves: loads them on the engine thread, puts them into service, says what
it offers.

`offers()` is what the node announces about itself; `changed` is called whenever it would read
differently.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from ..bus import StageOffer
from ..engine.batcher import Batcher, BatcherConfig
from ..engine.draft import Drafter, NgramDrafter, rewinds
from ..engine.pace import SpeedMeter, Work
from ..engine.prefix import PrefixPool, UnsharedPool
from ..engine.rows import Row
from ..engine.served import Engine
from ..engine.thread import all_threads
from ..engine.threads import ThreadTuner
from ..errors import EngineMissing, InvalidRequest, NoCapacity, ShoalError
from ..events import BackendChanged, Emit, StageChanged
from ..hardware import Speed
from ..models.checkpoint import Checkpoint
from ..models.gguf_checkpoint import GgufCheckpoint
from ..transport import FrameLimits, Links
from ..units import ModelId, NodeId, Quant, SessionId, Slice, readable_bytes
from .fronted import FrontedWorker
from .fronted_sessions import FrontedSessions, Slots
from .opening import MakeSampler
from .service import Pipeline
from .stage import StageSessions, StageSessionsConfig
from .worker import StageKey, StageWorker

if TYPE_CHECKING:
    from ..engine.gguf import GgufStage
    from ..engine.sampling import Samplers
    from ..engine.stage import Stage
    from ..engine.thread import EngineThread

Compute = Literal["f32", "bf16", "f16", "int8", "int4", "w8", "w4", "gguf", "served"]
WARM_UP_STEPS = 3
WARM_UP_TOKENS = 64


@dataclass(kw_only=True, frozen=True, slots=True)
class ServingConfig:
    memory_bytes: int  # for weights and KV pages together
    kv_tokens: int = 0  # 0 = as many as fit, up to `max_contexts` full contexts
    max_contexts: int = 16
    page_tokens: int = 16
    dtype: str | None = None  # None = the checkpoint's own
    quant: Quant = "none"
    device: str = "cpu"
    tune_threads: bool = False  # find the fastest number of them, up to torch's own choice
    draft: str = "ngram"  # who guesses tokens ahead: "ngram", "none" or a smaller model
    proofs_dir: Path | None = None
    scratch_dir: Path | None = None  # for files that are gone once they are read
    gateway_share: float = 1.0  # of our sessions and pages that one other node may have


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


def compute_class(checkpoint: Checkpoint, config: ServingConfig) -> Compute:
    """Stages work together only when they compute in the same class. What llama.cpp computes is one
    of its own, whatever its weights are packed in: another packing is another model.
    """
    if isinstance(checkpoint, GgufCheckpoint):
        return "gguf"
    return (
        cast(Compute, config.dtype or checkpoint.dtype) if config.quant == "none" else config.quant
    )


def import_engine() -> None:
    """Seconds of work. Raises EngineMissing when torch and friends are not installed."""
    try:
        from ..engine import prove, sampling, stage
        from ..models import slice as slices
    except ImportError as error:
        raise EngineMissing(
            f"this machine cannot compute: {error}",
            hint='install the engine with: pip install "shoal[engine]"',
        ) from error
    del prove, sampling, stage, slices


def load_stage(checkpoint: Checkpoint, layers: Slice, config: ServingConfig) -> Stage | GgufStage:
    """Prove the family, read the slice's bytes, set its pages aside."""
    import_engine()
    if isinstance(checkpoint, GgufCheckpoint):
        return _load_gguf(checkpoint, layers, config)
    import torch

    from ..engine.prove import prove
    from ..engine.stage import Stage, StageConfig, pages_for, slots_for
    from ..models.slice import load_slice

    prove(checkpoint, config.proofs_dir)
    try:
        model = load_slice(checkpoint, layers, config.dtype, config.quant, config.device)
    except torch.OutOfMemoryError as error:
        raise NoCapacity(
            f"layers {layers} of {checkpoint.name} do not fit into {config.device}: {error}",
            hint="serve fewer layers (--layers A:B), smaller weights (--quant w4), or --device cpu",
        ) from None
    weights = model.nbytes
    room = max(0, config.memory_bytes - weights)
    slots, pages = slots_for(model, room), pages_for(model, room, config.page_tokens)
    wanted = config.kv_tokens or config.max_contexts * checkpoint.context_length
    pages = min(pages, -(-wanted // config.page_tokens))
    if pages < 1:
        raise NoCapacity(
            f"layers {layers} of {checkpoint.name} leave no room for a KV cache: "
            f"{readable_bytes(weights)} of weights in {readable_bytes(config.memory_bytes)}",
            hint="serve fewer layers (--layers A:B) or allow more memory (--memory 80%)",
        )
    on_cpu = config.device == "cpu"
    tuner = ThreadTuner(all_threads()) if config.tune_threads and on_cpu else None
    size = StageConfig(page_size=config.page_tokens, pages=pages, slots=slots)
    return Stage(model, size, tuner=tuner)


def _load_gguf(checkpoint: GgufCheckpoint, layers: Slice, config: ServingConfig) -> GgufStage:
    from ..engine.gguf import load_gguf_stage

    return load_gguf_stage(
        checkpoint,
        layers,
        memory_bytes=config.memory_bytes,
        kv_tokens=config.kv_tokens or config.max_contexts * checkpoint.context_length,
        page_tokens=config.page_tokens,
        scratch=config.scratch_dir,
    )


def make_drafter(
    checkpoint: Checkpoint, layers: Slice, config: ServingConfig
) -> tuple[Drafter | None, int]:
    """Who guesses for a stage with the first layers, and the bytes of memory that it takes.

    Raises InvalidRequest for a draft model with other tokens, NoCapacity for one too large.
    """
    if config.draft == "none" or layers.start or not rewinds(checkpoint.config):
        return None, 0
    if config.draft == "ngram":
        return NgramDrafter(), 0
    import_engine()
    from ..engine.draft_model import load_drafter
    from ..models.checkpoint import open_checkpoint

    return load_drafter(
        open_checkpoint(config.draft),
        checkpoint,
        memory_bytes=config.memory_bytes,
        kv_tokens=config.kv_tokens,
        dtype=config.dtype,
        quant=config.quant,
        device=config.device,
    )


def make_samplers(checkpoint: Checkpoint, layers: Slice) -> Samplers:
    """Only a last stage is asked for any. Reads the tokenizer: up to a second for a large one."""
    from ..engine.grammar import Grammars
    from ..engine.sampling import Samplers

    if layers.stop != checkpoint.layers:
        return Samplers(InvalidRequest(f"layers {layers} choose no tokens"))
    try:
        return Samplers(Grammars.of(checkpoint.open_tokenizer(), checkpoint.vocab_size))
    except InvalidRequest as error:
        return Samplers(error)
    except ShoalError as error:  # layers can be served without a tokenizer
        return Samplers(InvalidRequest(error.message))


def step_tokens(stage: Stage | GgufStage) -> int:
    """Prompt tokens of one step: as many as fit into one frame beside a row for each session."""
    row_bytes = stage.model.hidden_size * stage.model.dtype.itemsize
    usual = BatcherConfig()
    fit = FrameLimits().max_body_bytes // row_bytes - usual.max_rows - usual.max_drafted
    return max(1, min(usual.max_tokens, fit))


def warm_up(stage: Stage | GgufStage, meter: SpeedMeter, clock: Callable[[], float]) -> None:
    """Show the meter steps of one token and of some: the best of a few, since the first ones
    compile kernels.
    """
    import torch

    model, session = stage.model, SessionId("warm-up")
    room = stage.config.pages * stage.config.page_size
    for count in {1, min(WARM_UP_TOKENS, room)}:
        pages = range(-(-count // stage.config.page_size))
        ids = (0,) * count if model.first else None
        hidden = None if model.first else torch.zeros(count, model.hidden_size, dtype=model.dtype)
        row = Row(session, 0, pages, count, ids, hidden)
        taken = []
        for _ in range(WARM_UP_STEPS):
            started = clock()
            stage.step([row])
            if model.device.type == "cuda":  # it works on after the call has returned
                torch.cuda.synchronize()
            taken.append(clock() - started)
            if stage.keeps_states:
                cast("Stage", stage).forget(session)
        meter.observe(Work.of([row]), min(taken))


@dataclass(frozen=True, slots=True)
class Loaded:
    """A slice in memory, and all that putting it into service takes."""

    stage: Stage | GgufStage
    samplers: MakeSampler
    meter: SpeedMeter
    drafter: Drafter | None = None


async def load(
    thread: EngineThread,
    checkpoint: Checkpoint,
    layers: Slice,
    config: ServingConfig,
    expected: Speed,
    clock: Callable[[], float],
) -> Loaded:
    """On the engine thread; `expected` is how fast the slice should be."""
    drafter, taken = await thread.run(make_drafter, checkpoint, layers, config)
    config = replace(config, memory_bytes=config.memory_bytes - taken)
    stage = await thread.run(load_stage, checkpoint, layers, config)
    meter = SpeedMeter(len(layers), expected)
    await thread.run(warm_up, stage, meter, clock)
    return Loaded(stage, await thread.run(make_samplers, checkpoint, layers), meter, drafter)


Load = Callable[
    ["EngineThread", Checkpoint, Slice, ServingConfig, Speed, Callable[[], float]],
    Awaitable[Loaded],
]


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

    def compute_on(self, device: str, memory_bytes: int) -> None:
        """Where slices are loaded from now on, and what they may take there."""
        self._config = replace(self._config, device=device, memory_bytes=memory_bytes)

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

        A slice of the same model that we held is given up first: there is memory for one, and a
        node moves only when the mesh has no route anyway.
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

    def stop(self) -> None:
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
            config=self._sessions_config(cast("Stage", stage)),
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

    def _sessions_config(self, stage: Stage) -> StageSessionsConfig:
        """A running state is one session's: nobody goes on from another's, and each has a slot."""
        usual = StageSessionsConfig()
        return StageSessionsConfig(
            gateway_share=self._config.gateway_share,
            window=getattr(stage, "window", None),
            share_prefixes=not stage.keeps_states,
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
