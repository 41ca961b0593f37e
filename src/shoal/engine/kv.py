"""The KV cache: one pair of pools a layer, shared by all sessions, allocated once.

A model sees it as its `past_key_values` (only `update` matters to a decoder) and hands it down to
the attention hook. Two kinds of layers: *direct* ones attend to exactly what they cached (keys and
values, or latents and rotated keys), so the context is read in place from the pools; the others
cache something smaller and compute keys and values from it, so the context is gathered for them.

T new tokens, all rows together · C context tokens, all rows together · K heads · D width cached
"""

# ruff: noqa: N803 - the letters at the end of a tensor's name are its axes

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..errors import UnsupportedModel
from ..exact.layer import Angles, DenseLayer
from ..models.mixers import Mixer
from ..models.skeleton import quiet
from ..models.slice import ModelSlice
from ..units import Slice
from .attention import Scores, attend_latents, attend_row
from .plan import Span, StepPlan
from .pools import allocate
from .states import Noted, SessionStates, StateLayout


@dataclass(frozen=True, slots=True)
class LayerKv:
    """What one layer caches for one token: (heads, width) of its first and second part."""

    keys: tuple[int, int]
    values: tuple[int, int]
    dtype: torch.dtype
    direct: bool
    window: int | None = None  # how far back it looks

    @property
    def bytes_per_token(self) -> int:
        heads, width = self.keys
        value_heads, value_width = self.values
        return (heads * width + value_heads * value_width) * self.dtype.itemsize

    @property
    def coded_bytes_per_token(self) -> int:
        """The same as 12-bit codes in 16 bits, with a scale for each head."""
        return sum(heads * (2 * width + 4) for heads, width in (self.keys, self.values))


KvLayout = dict[int, LayerKv]  # by layer index


def reach(layout: KvLayout) -> int | None:
    """How many tokens back, itself included, any of these layers looks; None is all of them."""
    windows = [layer.window for layer in layout.values()]
    return max((w for w in windows if w is not None), default=None) if all(windows) else None


def kv_bytes_per_token(layout: KvLayout, *, exact: bool) -> int:
    return sum(
        layer.coded_bytes_per_token if exact else layer.bytes_per_token for layer in layout.values()
    )


class AsCache:
    """What else transformers asks a cache in passing: it matters to masks, and we build our own."""

    is_compileable = False
    is_sliding = (False,)

    def get_seq_length(self, *_: Any) -> int:
        return 0

    def get_query_offset(self, *_: Any) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, *_: Any) -> tuple[int, int]:
        return query_length, 0

    def __len__(self) -> int:
        return 1


class _Probe(AsCache):
    """Stands in for the cache in a forward of one token, and notes what each layer caches."""

    def __init__(self) -> None:
        self.layout: KvLayout = {}
        self.states: StateLayout = {}
        self._updated = -1
        self._keys: Tensor | None = None

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        self._updated, self._keys = layer_idx, keys
        self.layout[layer_idx] = LayerKv(
            (keys.shape[1], keys.shape[3]),
            (values.shape[1], values.shape[3]),
            keys.dtype,
            direct=False,
        )
        return keys, values

    def dense(
        self,
        layers: Mapping[int, DenseLayer],
        own: Slice,
        x: Tensor,
        angles: Angles,
        dtype: torch.dtype,
    ) -> Tensor:
        for index in own:
            layer = layers[index]
            each = (layer.attention.kv_heads, layer.attention.width)
            window = layer.attention.scores.window
            self.layout[index] = LayerKv(each, each, dtype, direct=True, window=window)
        return x

    def attend(self, q_1HTD: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
        if self._updated not in self.layout:
            raise UnsupportedModel("its layers attend without a cache of keys and values")
        seen = self.layout[self._updated]
        self.layout[self._updated] = replace(seen, direct=k is self._keys, window=how["window"])
        return attend_row(q_1HTD[0].transpose(0, 1), k, v, None, Scores(**how))[None]

    def attend_latents(self, q_1HTD: Tensor, latents: Tensor, turned: Tensor, **_: Any) -> Tensor:
        seen = self.layout[self._updated]
        self.layout[self._updated] = LayerKv(seen.keys, seen.values, seen.dtype, direct=True)
        return latents.expand(1, 1, q_1HTD.shape[1], -1)

    def mix(self, layer: int, mixer: Mixer, x_1TE: Tensor) -> Tensor:
        noted = Noted()
        out = mixer(x_1TE, noted)
        self.states[layer] = noted.layer
        mixer(x_1TE, noted.begun(x_1TE.device))  # warms what goes on from a state, too
        return out


_measured: WeakKeyDictionary[ModelSlice, _Probe] = WeakKeyDictionary()


def kv_layout(model: ModelSlice) -> KvLayout:
    """What the layers cache: learnt once, from a forward of one token, which warms the weights."""
    return _measured_once(model).layout


def state_layout(model: ModelSlice) -> StateLayout:
    """The running states that layers keep, learnt with it; none in most models."""
    return _measured_once(model).states


def _measured_once(model: ModelSlice) -> _Probe:
    if model not in _measured:
        _measured[model] = _measure(model)
    return _measured[model]


@torch.inference_mode()
def _measure(model: ModelSlice) -> _Probe:
    probe = _Probe()
    token = torch.zeros(1, dtype=torch.int64, device=model.device)
    hidden = torch.zeros(1, model.hidden_size, dtype=model.dtype, device=model.device)
    with quiet():
        model(token if model.first else hidden, token, probe, probe)
    if sorted(probe.layout.keys() | probe.states.keys()) != list(model.layers):
        raise UnsupportedModel(
            "some of its layers keep neither keys and values nor a state, or under another number"
        )
    return probe


class PagedKv(AsCache):
    """The pools of one stage, and attention over them. `begin` a step before each forward."""

    def __init__(
        self,
        layout: KvLayout,
        pages: int,
        page_size: int,
        device: torch.device,
        states: SessionStates | None = None,
    ) -> None:
        self._page_size = page_size
        self._states = states
        self._direct = {index: layer.direct for index, layer in layout.items()}
        self._pools = {
            index: tuple(
                allocate(pages * page_size, *shape, dtype=layer.dtype, device=device)
                for shape in (layer.keys, layer.values)
            )
            for index, layer in layout.items()
        }
        self._plan: StepPlan
        self._newest: tuple[Tensor | None, int] = (None, -1)  # keys just cached, and their layer

    def begin(self, plan: StepPlan) -> None:
        self._plan = plan

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Cache the new tokens, (1, K, T, D) each. Direct layers get them back; the others get (1,
        K, C, D).
        """
        slots = self._plan.slots
        key_pool, value_pool = self._pools[layer_idx]
        key_pool.index_copy_(0, slots, keys[0].transpose(0, 1))
        value_pool.index_copy_(0, slots, values[0].transpose(0, 1))
        if self._direct[layer_idx]:
            self._newest = (keys, layer_idx)
            return keys, values
        return self._gathered(key_pool), self._gathered(value_pool)

    def mix(self, layer: int, mixer: Mixer, x_1TE: Tensor) -> Tensor:
        """The `States` of models/mixers.py."""
        assert self._states is not None  # noqa: S101 - their layout is measured with ours
        return self._states.mix(layer, mixer, x_1TE)

    def _gathered(self, pool: Tensor) -> Tensor:
        parts = [self._context(pool, span, 0) for span in self._plan.spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def _context(self, pool: Tensor, span: Span, first: int) -> Tensor:
        """Tokens first..stop-1 of a row, (1, K, S, D): in place when its pages are neighbours."""
        heads, width = pool.shape[1:]
        step = heads * width
        if span.pages is None:
            at = (span.base + first) * step
            return pool.as_strided((1, heads, span.stop - first, width), (0, width, step, 1), at)
        skipped = first // self._page_size
        paged = pool.view(-1, self._page_size, heads, width).index_select(0, span.pages[skipped:])
        shift = skipped * self._page_size
        return paged.view(-1, heads, width)[first - shift : span.stop - shift].transpose(0, 1)[None]

    def attend(self, q_1HTD: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
        """The `Ragged` of models/attention.py."""
        scores, plan = Scores(**how), self._plan
        newest, layer = self._newest
        direct = k is newest
        rows: list[Tensor] = []
        at = 0
        for span, queries in zip(
            plan.spans, torch.split(q_1HTD[0].transpose(0, 1), plan.counts), strict=True
        ):
            first = 0 if scores.window is None else max(0, span.start - scores.window + 1)
            if direct:
                key_pool, value_pool = self._pools[layer]
                keys, values = (
                    self._context(key_pool, span, first),
                    self._context(value_pool, span, first),
                )
            else:
                keys, values = (
                    k[:, :, at + first : at + span.stop],
                    v[:, :, at + first : at + span.stop],
                )
                at += span.stop
            rows.append(
                attend_row(queries, keys, values, self._mask(span, first, scores.window), scores)
            )
        return (rows[0] if len(rows) == 1 else torch.cat(rows))[None]

    def attend_latents(
        self, q_1HTD: Tensor, latents: Tensor, turned: Tensor, *, scaling: float
    ) -> Tensor:
        plan, pools, rows = self._plan, self._pools[self._newest[1]], []
        queries = torch.split(q_1HTD[0].transpose(0, 1), plan.counts)
        for span, mine in zip(plan.spans, queries, strict=True):
            first, second = (self._context(pool, span, 0)[0, 0] for pool in pools)
            mask = None if span.count == 1 else plan.mask(span.count, span.stop, None)
            rows.append(attend_latents(mine, first, second, mask, scaling))
        return (rows[0] if len(rows) == 1 else torch.cat(rows))[None]

    def _mask(self, span: Span, first: int, window: int | None) -> Tensor | None:
        context = span.stop - first
        if span.count == 1 or (span.count == context and (window is None or context <= window)):
            return None
        return self._plan.mask(span.count, context, window)
