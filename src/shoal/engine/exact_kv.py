"""The KV cache of the exact class: keys and values as 12-bit codes with a scale each, and attention
over them by `exact/attention.py`. As large as a 16-bit float cache, and 4 bytes for each head.

T new tokens, all rows together · B rows of one shape · N new tokens of each · S places for context
H heads · K kv heads · D width
"""

# ruff: noqa: N803, N806 - the letters at the end of a tensor's name are its axes

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..exact.attention import BLOCK, Context, Scores, attend
from ..exact.latent import attend_latents
from ..exact.layer import Angles, DenseLayer, run_layer
from ..exact.numbers import round_rows
from ..units import Slice
from .kv import AsCache, KvLayout
from .plan import Group, StepPlan
from .pools import allocate

Attend = Callable[[Tensor, Tensor, Context], Tensor]
"""(queries (B, N, H, D), positions (B, N), what is cached of them) -> (B, N, H, W)."""


class ExactKv(AsCache):
    """The pools of one stage. `begin` a step before each forward."""

    def __init__(self, layout: KvLayout, pages: int, page_size: int, device: torch.device) -> None:
        slots = pages * page_size
        self._pools = {
            index: tuple(
                allocate(slots, heads, *width, dtype=dtype, device=device)
                for heads, size in (layer.keys, layer.values)
                for width, dtype in (((size,), torch.int16), ((), torch.float32))
            )
            for index, layer in layout.items()
        }
        self._plan: StepPlan
        self._newest = -1  # the layer that cached last

    def begin(self, plan: StepPlan) -> None:
        self._plan = plan

    # ---- as a model's own modules see it

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Cache the new tokens, (1, K, T, D) each, and give them back."""
        self._cache(layer_idx, keys[0].transpose(0, 1).float(), values[0].transpose(0, 1).float())
        self._newest = layer_idx
        return keys, values

    def attend(
        self,
        q_1HTD: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scaling: float | None,
        window: int | None,
        sinks: Tensor | None,
        softcap: float | None,
    ) -> Tensor:
        """The `Ragged` of models/attention.py."""
        how = Scores(
            q_1HTD.shape[-1] ** -0.5 if scaling is None else scaling,
            window,
            None if sinks is None else sinks.float(),
            softcap,
        )
        q_THD = q_1HTD[0].transpose(0, 1).float()
        return self._scored(self._newest, q_THD, how).to(q_1HTD.dtype)[None]

    def _scored(self, layer: int, q_THD: Tensor, how: Scores) -> Tensor:
        return self._attend(layer, q_THD, how.window, _as(how))

    def attend_latents(
        self, q_1HTD: Tensor, latents: Tensor, turned: Tensor, *, scaling: float
    ) -> Tensor:
        def each(q_BNHD: Tensor, positions: Tensor, context: Context) -> Tensor:
            return attend_latents(q_BNHD, positions, context, scaling)

        q_THD = q_1HTD[0].transpose(0, 1).float()
        return self._attend(self._newest, q_THD, None, each).to(q_1HTD.dtype)[None]

    # ---- as the layers of models/dense.py see it

    def dense(
        self,
        layers: Mapping[int, DenseLayer],
        own: Slice,
        x: Tensor,
        angles: Angles,
        dtype: torch.dtype,
    ) -> Tensor:
        """(T, E) float32 through the layers in `own`."""
        for index in own:

            def cached(q: Tensor, k: Tensor, v: Tensor, how: Scores, at: int = index) -> Tensor:
                self._cache(at, k, v)
                return self._scored(at, q, how)

            x = run_layer(layers[index], x, angles, cached, dtype)
        return x

    def _cache(self, layer: int, k_TKD: Tensor, v_TKD: Tensor) -> None:
        keys, key_scale, values, value_scale = self._pools[layer]
        slots = self._plan.slots
        for fresh, codes, scales in ((k_TKD, keys, key_scale), (v_TKD, values, value_scale)):
            rounded, scale = round_rows(fresh)
            codes.index_copy_(0, slots, rounded.to(torch.int16))
            scales.index_copy_(0, slots, scale)

    def _attend(self, layer: int, q_THD: Tensor, window: int | None, attend: Attend) -> Tensor:
        """(T, H, W): rows of one token together, longer ones one by one."""
        groups = self._plan.groups()
        if len(groups) == 1:  # in the order of tokens
            return self._attend_group(layer, q_THD, groups[0], window, attend)
        found = [
            self._attend_group(layer, q_THD[group.tokens], group, window, attend)
            for group in groups
        ]
        out = found[0].new_empty(len(q_THD), *found[0].shape[1:])
        for group, part in zip(groups, found, strict=True):
            out[group.tokens] = part
        return out

    def _attend_group(
        self, layer: int, q_THD: Tensor, group: Group, window: int | None, attend: Attend
    ) -> Tensor:
        first, slots = group.context(window, BLOCK)
        rows, places = slots.shape
        context = Context(
            first,
            *(
                pool.index_select(0, slots.view(-1)).view(rows, places, *pool.shape[1:])
                for pool in self._pools[layer]
            ),
        )
        q_BNHD = q_THD.reshape(rows, -1, *q_THD.shape[1:])
        return attend(q_BNHD, group.positions, context).flatten(0, 1)


def _as(how: Scores) -> Attend:
    return lambda q_BNHD, positions, context: attend(q_BNHD, positions, context, how)
