"""The KV cache of the exact class where the compiled library computes: the same pools and bits."""

# T new tokens, all rows together · E hidden width · H heads · K kv heads · D width
# ruff: noqa: N803 - the letters at the end of a tensor's name are its axes

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..exact import native
from ..exact.attention import Scores
from ..exact.layer import Angles, DenseLayer
from ..exact.native_layer import NativeAttention, NativeLayers, NativeStep, Pools
from ..units import Slice
from .exact_kv import ExactKv
from .kv import KvLayout
from .plan import StepPlan


def exact_kv(layout: KvLayout, pages: int, page_size: int, device: torch.device) -> ExactKv:
    """Compiled where there is a library for this device."""
    library = native.load() if device.type == "cpu" else None
    if library is None:
        return ExactKv(layout, pages, page_size, device)
    return CompiledKv(layout, pages, page_size, device, library)


class CompiledKv(ExactKv):
    def __init__(
        self,
        layout: KvLayout,
        pages: int,
        page_size: int,
        device: torch.device,
        library: native.Native,
    ) -> None:
        super().__init__(layout, pages, page_size, device)
        self._library = library
        self._layers: NativeLayers | None = None
        self._first: int  # of these layers
        self._attention: dict[int, NativeAttention] = {}
        self._fresh: tuple[Tensor, Tensor]  # keys and values that wait for their queries
        self._step: NativeStep | None = None

    def begin(self, plan: StepPlan) -> None:
        super().begin(plan)
        self._step = None

    def dense(
        self,
        layers: Mapping[int, DenseLayer],
        own: Slice,
        x: Tensor,
        angles: Angles,
        dtype: torch.dtype,
    ) -> Tensor:
        """In one call; x is overwritten."""
        if self._layers is None:
            parts = [(layer, Pools(*self._pools[index])) for index, layer in layers.items()]
            self._layers, self._first = NativeLayers(self._library, parts), min(layers)
        start = own.start - self._first
        self._layers.run(self._native_step(angles), x, dtype, range(start, start + len(own)))
        return x

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """They are cached when their queries attend."""
        self._newest, self._fresh = layer_idx, (keys, values)
        return keys, values

    def attend_latents(
        self, q_1HTD: Tensor, latents: Tensor, turned: Tensor, *, scaling: float
    ) -> Tensor:
        """Plain: wider than the library's attention goes."""
        self._cache(self._newest, *(x[0].transpose(0, 1).float() for x in self._fresh))
        return super().attend_latents(q_1HTD, latents, turned, scaling=scaling)

    def _scored(self, layer: int, q_THD: Tensor, how: Scores) -> Tensor:
        if layer not in self._attention:
            pools = Pools(*self._pools[layer])
            self._attention[layer] = NativeAttention(self._library, pools, how)
        if self._step is None:
            self._step = self._native_step()
        keys, values = (x[0].transpose(0, 1).float().contiguous() for x in self._fresh)
        return self._attention[layer](self._step, q_THD.contiguous(), keys, values)

    def _native_step(self, *angles: Angles) -> NativeStep:
        plan = self._plan
        starts = [span.start for span in plan.spans]
        return NativeStep(starts, plan.counts, plan.pages, plan.page_size, plan.slots, angles)
