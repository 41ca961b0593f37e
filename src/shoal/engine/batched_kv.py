"""The float KV cache as GPUs want it: rows of one token attend in one call, with contexts filled up
to the longest. On CPUs, where each row reads its context in place, that would be slower.

T new tokens, all rows together · B rows of one token · S places for context · H heads · K kv heads
D head width · W of values · R of latents
"""

# ruff: noqa: N803 - the letters at the end of a tensor's name are its axes

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .attention import Scores, attend_batch, attend_latents, attend_latents_batch, attend_row
from .kv import PagedKv
from .plan import Group, Span

BLOCK = 64  # tokens to which contexts are filled up

One = Callable[[Group, Tensor], Tensor]  # (B, H, D) -> (B, H, W)
Longer = Callable[[Span, Tensor], Tensor]  # (count, H, D) -> (count, H, W)


class BatchedKv(PagedKv):
    def attend(self, q_1HTD: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
        """The `Ragged` of models/attention.py."""
        newest, layer = self._newest
        if k is not newest or not self._together():
            return super().attend(q_1HTD, k, v, **how)
        scores = Scores(**how)
        window = scores.window

        def one(group: Group, q_BHD: Tensor) -> Tensor:
            keys, values = self._gather(layer, group, window)
            return attend_batch(q_BHD, keys, values, group.seen(window, BLOCK), scores)

        def longer(span: Span, q_NHD: Tensor) -> Tensor:
            first = 0 if window is None else max(0, span.start - window + 1)
            keys, values = (self._context(pool, span, first) for pool in self._pools[layer])
            return attend_row(q_NHD, keys, values, self._mask(span, first, window), scores)

        return self._in_groups(q_1HTD[0].transpose(0, 1), one, longer)[None]

    def attend_latents(
        self, q_1HTD: Tensor, latents: Tensor, turned: Tensor, *, scaling: float
    ) -> Tensor:
        if not self._together():
            return super().attend_latents(q_1HTD, latents, turned, scaling=scaling)
        layer = self._newest[1]

        def one(group: Group, q_BHD: Tensor) -> Tensor:
            first, second = (part[:, :, 0] for part in self._gather(layer, group, None))
            return attend_latents_batch(q_BHD, first, second, group.seen(None, BLOCK), scaling)

        def longer(span: Span, q_NHD: Tensor) -> Tensor:
            first, second = (self._context(pool, span, 0)[0, 0] for pool in self._pools[layer])
            mask = self._plan.mask(span.count, span.stop, None)
            return attend_latents(q_NHD, first, second, mask, scaling)

        return self._in_groups(q_1HTD[0].transpose(0, 1), one, longer)[None]

    def _together(self) -> bool:
        """Whether this step has several rows of one token, of much the same length."""
        single = next((group for group in self._plan.groups() if group.count == 1), None)
        if single is None:
            return False
        return not single.spans or (len(single.spans) > 1 and single.evenly_long)

    def _in_groups(self, q_THD: Tensor, one: One, longer: Longer) -> Tensor:
        groups = self._plan.groups()
        if len(groups) == 1:
            return one(groups[0], q_THD)
        parts = [q_THD[group.tokens] for group in groups]
        found = [
            one(group, part) if group.count == 1 else longer(group.spans[0], part)
            for group, part in zip(groups, parts, strict=True)
        ]
        out = found[0].new_empty(len(q_THD), *found[0].shape[1:])
        for group, part in zip(groups, found, strict=True):
            out[group.tokens] = part
        return out

    def _gather(self, layer: int, group: Group, window: int | None) -> tuple[Tensor, Tensor]:
        """(B, S, K, D) and (B, S, K, W): all contexts, from the first place in reach."""
        _, slots = group.context(window, BLOCK)
        keys, values = (
            pool.index_select(0, slots.flatten()).view(*slots.shape, *pool.shape[1:])
            for pool in self._pools[layer]
        )
        return keys, values
