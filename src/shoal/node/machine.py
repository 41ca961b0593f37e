"""What this machine has, and which of its devices computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ..config import parse_memory
from ..engine.thread import EngineThread
from ..hardware import choose_device, detect, load_or_measure
from ..models.checkpoint import Checkpoint
from ..models.gguf_checkpoint import GgufCheckpoint
from ..pipeline import ServingConfig
from ..pipeline.loading import history_bytes
from ..units import Quant
from .choosing import fits_into
from .config import NodeConfig

PUBLIC_SHARE = 0.75  # of our pages for one stranger: whoever comes next finds some


class Machine:
    """`device` computes; of its memory `offered_bytes` are for slices, and `history_bytes` beside
    them for what these have sent on: together what the user allows.
    """

    def __init__(self, config: NodeConfig, thread: EngineThread) -> None:
        self._config, self._thread = config, thread
        self.capability = detect(gpus=False)  # the rest when torch is there
        self._offer(self.capability.memory_bytes)
        self.device = "cpu"
        self.compute_on: Callable[[str, int, int], None] = lambda device, offered, history: None

    def _offer(self, memory_bytes: int) -> None:
        allowed = parse_memory(self._config.memory, memory_bytes)
        self.history_bytes = history_bytes(allowed)
        self.offered_bytes = allowed - self.history_bytes

    async def look_around(self, *, gpus: bool) -> None:
        """A pinned slice needs no figures to be chosen by: it starts at once."""
        if self._config.layers is None:
            measured = self._config.folders.capability_file
            self.capability = await self._thread.run(load_or_measure, measured, gpus=gpus)
        else:
            self.capability = await self._thread.run(detect, gpus=gpus)

    async def choose_device(self, model: Checkpoint, quant: Quant, dtype: str | None) -> None:
        """Where slices of this model are computed: the memory that we offer is that device's."""
        config, found = self._config, self.capability
        as_what = self.serving_config(quant, dtype)
        fits = partial(fits_into, model, config.layers, as_what, config.memory)
        wish = "cpu" if isinstance(model, GgufCheckpoint) else config.device
        device = choose_device(wish, found, fits)
        if device.name == "cpu" and found.devices[:-1]:  # what we tell of a GPU would be no use
            await self.look_around(gpus=False)
        self._offer(device.memory_bytes)
        self.device = device.name
        self.compute_on(device.name, self.offered_bytes, self.history_bytes)

    def serving_config(self, quant: Quant = "none", dtype: str | None = None) -> ServingConfig:
        config = self._config
        return ServingConfig(
            memory_bytes=self.offered_bytes,
            history_bytes=self.history_bytes,
            kv_tokens=config.kv_tokens,
            dtype=dtype,
            quant=quant,
            device=self.device,
            draft=config.draft,
            tune_threads=not config.threads,
            proofs_dir=config.folders.proofs_dir,
            scratch_dir=config.folders.scratch_dir,
            gateway_share=1.0 if config.mesh.is_private else PUBLIC_SHARE,
        )
