"""How a slice comes into memory: proved, read, its pages set aside, its first steps measured."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from ..engine.batcher import BatcherConfig
from ..engine.draft import Drafter, NgramDrafter, rewinds
from ..engine.pace import SpeedMeter, Work
from ..engine.rows import Row
from ..engine.thread import all_threads
from ..engine.threads import ThreadTuner
from ..errors import EngineMissing, InvalidRequest, NoCapacity, ShoalError
from ..hardware import Speed
from ..models.checkpoint import Checkpoint
from ..models.gguf_checkpoint import GgufCheckpoint
from ..transport import FrameLimits
from ..units import Quant, SessionId, Slice, readable_bytes
from .opening import MakeSampler

if TYPE_CHECKING:
    from ..engine.gguf import GgufStage
    from ..engine.sampling import Samplers
    from ..engine.stage import Stage
    from ..engine.thread import EngineThread

Compute = Literal["f32", "bf16", "f16", "int8", "int4", "w8", "w4", "gguf", "served"]
WARM_UP_STEPS = 3
WARM_UP_TOKENS = 64
MOST_HISTORY_BYTES, HISTORY_SHARE = 256 << 20, 20


def history_bytes(offered_bytes: int) -> int:
    """Of the memory that a node offers, what is for hidden states that may be sent again."""
    return min(MOST_HISTORY_BYTES, offered_bytes // HISTORY_SHARE)


@dataclass(kw_only=True, frozen=True, slots=True)
class ServingConfig:
    memory_bytes: int  # for weights and KV pages together
    history_bytes: int = MOST_HISTORY_BYTES  # beside these: what was sent on
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
