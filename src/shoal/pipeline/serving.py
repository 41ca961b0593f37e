"""The slices this node serves: loads them on the engine thread, puts them into service, says what it offers.

`offers()` is what the node announces about itself; `changed` is called whenever it would read differently.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..bus import StageOffer
from ..engine.pages import PagePool
from ..errors import EngineMissing, NoCapacity
from ..events import Emit, StageChanged
from ..models.checkpoint import Checkpoint
from ..transport import Links
from ..units import NodeId, Slice, readable_bytes
from .service import Pipeline
from .stage import StageSessions
from .worker import StageKey, StageWorker

if TYPE_CHECKING:
    from ..engine.stage import Stage
    from ..engine.thread import EngineThread

WARM_UP_STEPS = 3


@dataclass(kw_only=True, frozen=True, slots=True)
class ServingConfig:
    memory_bytes: int  # for weights and KV pages together
    kv_tokens: int = 0  # 0 = as many as fit, up to `max_contexts` full contexts
    max_contexts: int = 16
    page_tokens: int = 16
    threads: int = 0  # 0 = leave it to torch
    dtype: str | None = None  # None = the checkpoint's own
    quant: Literal["none", "int8"] = "none"
    device: str = "cpu"
    proofs_dir: Path | None = None


@dataclass(frozen=True, slots=True)
class Served:
    """One slice of one model on this node. `worker` is None until it is in service."""

    checkpoint: Checkpoint
    layers: Slice
    compute: str
    state: Literal["joining", "serving", "draining"]
    layer_seconds: float
    worker: StageWorker | None = None


def _load_stage(checkpoint: Checkpoint, layers: Slice, config: ServingConfig) -> tuple[Stage, int]:
    """Prove the family, read the slice's bytes, set its pages aside; returns the stage and its number of pages."""
    try:
        from ..engine.prove import prove
        from ..engine.stage import Stage, StageConfig, pages_for
        from ..models.slice import load_slice
    except ImportError as error:
        raise EngineMissing(
            f"this machine cannot compute: {error}",
            hint='install the engine with: pip install "shoal[engine]"',
        ) from error
    prove(checkpoint, config.proofs_dir)
    weights = checkpoint.slice_bytes(layers)
    model = load_slice(checkpoint, layers, config.dtype, config.quant, config.device)
    room = config.memory_bytes - weights
    pages = pages_for(model, max(room, 0), config.page_tokens)
    wanted = config.kv_tokens or config.max_contexts * checkpoint.context_length
    pages = min(pages, -(-wanted // config.page_tokens))
    if pages < 1:
        raise NoCapacity(
            f"layers {layers} of {checkpoint.name} leave no room for a KV cache: "
            f"{readable_bytes(weights)} of weights in {readable_bytes(config.memory_bytes)}",
            hint="serve fewer layers (--layers A:B) or allow more memory (--memory 80%)",
        )
    return Stage(model, StageConfig(page_size=config.page_tokens, pages=pages)), pages


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
        self._me, self._pipeline, self._links, self._thread = me, pipeline, links, thread
        self._config, self._emit, self._clock, self._changed = config, emit, clock, changed
        self._served: dict[str, Served] = {}  # by model id: one slice of a model a node

    @property
    def slices(self) -> list[Served]:
        return list(self._served.values())

    def held(self, model: str) -> Served | None:
        return self._served.get(model)

    async def serve(self, checkpoint: Checkpoint, layers: Slice, seconds_per_layer: float) -> None:
        """Load a slice and put it into service; a slice of the same model that we held is drained first."""
        model = checkpoint.model_id
        before = self._served.get(model)
        compute = compute_class(checkpoint, self._config)
        self._put(Served(checkpoint, layers, compute, "joining", seconds_per_layer))
        try:
            stage, pages = await self._thread.run(_load_stage, checkpoint, layers, self._config)
            step_seconds = await self._thread.run(_warm_up, stage, checkpoint, layers)
        except BaseException:
            self._forget(model, "failed")
            raise
        if before is not None and before.worker is not None:
            self._pipeline.stop(before.worker.key)
        worker = self._worker(checkpoint, layers, compute, stage, pages)
        self._pipeline.serve(worker)
        self._put(Served(checkpoint, layers, compute, "serving", step_seconds / len(layers), worker))

    def drain(self) -> None:
        """Take no new sessions; those that run go on."""
        for served in self.slices:
            if served.worker is not None:
                served.worker.draining = True
            self._put(replace(served, state="draining"))

    def stop(self) -> None:
        for model, served in list(self._served.items()):
            if served.worker is not None:
                self._pipeline.stop(served.worker.key)
            self._forget(model, "left")

    def offers(self) -> tuple[StageOffer, ...]:
        return tuple(self._offer(served) for served in self.slices)

    def _worker(
        self, checkpoint: Checkpoint, layers: Slice, compute: str, stage: Stage, pages: int
    ) -> StageWorker:
        from ..engine.sampling import SamplerState

        sessions = StageSessions(
            me=self._me,
            first=layers.start == 0,
            last=layers.stop == checkpoint.layers,
            vocab_size=checkpoint.vocab_size,
            pool=PagePool(pages, self._config.page_tokens),
            make_sampler=SamplerState,
        )
        return StageWorker(
            StageKey(checkpoint.model_id, compute, layers),
            sessions,
            stage,
            thread=self._thread,
            links=self._links,
            emit=self._emit,
            clock=self._clock,
        )

    def _offer(self, served: Served) -> StageOffer:
        sessions = served.worker.sessions if served.worker is not None else None
        return StageOffer(
            model=served.checkpoint.model_id,
            model_name=served.checkpoint.name,
            total_layers=served.checkpoint.layers,
            layers=served.layers,
            compute=served.compute,
            state=served.state,
            layer_seconds=served.layer_seconds,
            overhead_seconds=0.0,
            queue=sessions.waiting if sessions else 0,
            free_tokens=sessions.pool.free_tokens if sessions else 0,
            total_tokens=sessions.pool.total_tokens if sessions else 0,
            context_length=served.checkpoint.context_length,
        )

    def _put(self, served: Served) -> None:
        self._served[served.checkpoint.model_id] = served
        self._emit(StageChanged(served.checkpoint.model_id, served.layers, served.state))
        self._changed()

    def _forget(self, model: str, state: str) -> None:
        served = self._served.pop(model)
        self._emit(StageChanged(served.checkpoint.model_id, served.layers, state))
        self._changed()
