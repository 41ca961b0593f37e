"""What a simulated node is made of, and the twin of loading a slice into it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from ..engine.pace import SpeedMeter
from ..errors import NoCapacity
from ..hardware import Capability, Speed
from ..pipeline import ServingConfig
from ..pipeline.loading import Loaded
from ..placement.cost import predict
from ..units import Slice
from .engine import SimSampler, SimStage, SimStageConfig, SketchStage, Timing, by_speed
from .model import SimModel

if TYPE_CHECKING:
    from ..engine.thread import EngineThread
    from ..models.checkpoint import Checkpoint

PAGE_TOKENS = 16
MAX_KV_TOKENS = 1 << 20  # of one stage: more only costs the simulator memory

SpeedOf = Callable[[SimModel, Slice], Speed]


@dataclass(kw_only=True, frozen=True)
class Machine:
    """`speed` says how long the steps of a slice take; None: as `capability` lets expect. `timing`
    says what they take indeed, where that is another thing.
    """

    memory_bytes: int
    capability: Capability = field(default_factory=Capability)
    speed: SpeedOf | None = None
    timing: Callable[[SimModel, Slice], Timing] | None = None
    load_bytes_per_s: float = 1e9
    models: tuple[SimModel, ...] = ()  # that it has the files of
    pinned: Slice | None = None  # of the first of them
    reserve_tokens: int = 4096  # room that is kept before weights are counted
    gateway: bool = True
    region: str = ""
    kind: str = ""  # what it is called in scenarios and reports
    exact: bool = True  # False: takes its time, computes nothing

    def speed_of(self, model: SimModel, layers: Slice) -> Speed:
        if self.speed is not None:
            return self.speed(model, layers)
        return predict(self.capability, model.shape, model.dtype, layers)

    def kv_tokens(self, model: SimModel, layers: Slice) -> int:
        """For how many tokens there is room beside the weights."""
        room = self.memory_bytes - model.shape.slice_bytes(layers)
        return min(MAX_KV_TOKENS, room // max(1, model.kv_bytes * len(layers)))


@dataclass
class Loader:
    """One machine's: `spend` is told what loading and steps take."""

    machine: Machine
    spend: Callable[[float], None]
    loaded_bytes: int = 0
    slowness: float = 1.0  # times as slow as the machine should be
    stage: SimStage | None = None  # the newest

    async def load(
        self,
        thread: EngineThread,
        checkpoint: Checkpoint,
        layers: Slice,
        config: ServingConfig,
        expected: Speed,
        clock: Callable[[], float],
    ) -> Loaded:
        """The twin of `loading.load`."""
        stage = await thread.run(self._stage, cast(SimModel, checkpoint), layers)
        meter = SpeedMeter(len(layers), expected)
        return Loaded(stage, SimSampler, meter)  # type: ignore[arg-type]  # twins

    def slow(self, times: float) -> None:
        self.slowness = times
        if self.stage is not None:
            self.stage.slowness = times

    def _stage(self, model: SimModel, layers: Slice) -> SimStage:
        machine, size = self.machine, model.shape.slice_bytes(layers)
        tokens = machine.kv_tokens(model, layers)
        if tokens < PAGE_TOKENS:
            raise NoCapacity(f"layers {layers} of {model.name} leave no room for a KV cache")
        self.loaded_bytes += size
        self.spend(size / machine.load_bytes_per_s)
        timing = machine.timing or (lambda of, part: by_speed(machine.speed_of(of, part)))
        kind = SimStage if machine.exact else SketchStage
        pages = SimStageConfig(PAGE_TOKENS, tokens // PAGE_TOKENS)
        self.stage = kind(model, layers, pages, timing(model, layers), self.spend)
        self.stage.slowness = self.slowness
        return self.stage
