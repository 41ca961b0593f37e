"""One decoder layer of the usual kind in the exact class: the plain form, and the layer's parts.

The compiled library runs whole ranges of such layers in one call (`csrc/layer.cpp`), with the same
bits. What a model's own modules must look like to be read as one is in `models/dense.py`.

T new tokens, all rows together · E hidden width · H heads · K kv heads · D head width
F width of the feed-forward · R entries of a head that are rotated
"""

# ruff: noqa: N806 - the letters at the end of a tensor's name are its axes

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .attention import Scores
from .linear import Linear
from .numbers import gelu_tanh, rms_norm, rotate, silu

Activation = Literal["silu", "gelu_tanh"]
Attend = Callable[[Tensor, Tensor, Tensor, Scores], Tensor]
"""(q (T, H, D), k (T, K, D), v (T, K, D), how) -> (T, H, D): caches k and v, then attends."""


@dataclass(frozen=True, slots=True, eq=False)
class AttentionPart:
    """Norm, joined query, key and value product, norms of the heads, rotation, output product."""

    norm: Tensor  # (E,)
    qkv: Linear  # E -> (H + 2 K) * D, rows in this order
    out: Linear  # H * D -> E
    heads: int
    kv_heads: int
    width: int  # D
    scores: Scores
    query_norm: Tensor | None = None  # (D,), or (H * D,): over all heads together
    key_norm: Tensor | None = None  # (D,), or (K * D,)
    after: Tensor | None = None  # (E,) norm of the result, before it is added
    rotary: int = 0  # which of the step's tables of angles
    eps: float = 1e-6

    @property
    def linears(self) -> tuple[Linear, Linear]:
        return self.qkv, self.out


@dataclass(frozen=True, slots=True, eq=False)
class FeedForward:
    """Norm, joined gate and up product, activation, down product."""

    norm: Tensor  # (E,)
    gate_up: Linear  # E -> 2 F, gate first
    down: Linear  # F -> E
    activation: Activation
    after: Tensor | None = None
    eps: float = 1e-6

    @property
    def linears(self) -> tuple[Linear, Linear]:
        return self.gate_up, self.down


@dataclass(frozen=True, slots=True, eq=False)
class DenseLayer:
    attention: AttentionPart
    feed_forward: FeedForward


@dataclass(frozen=True, slots=True, eq=False)
class Angles:
    """cos and sin of the positions of a step, (T, R / 2) float32 each."""

    cos: Tensor
    sin: Tensor


def run_layer(
    layer: DenseLayer, x: Tensor, angles: Angles, attend: Attend, dtype: torch.dtype
) -> Tensor:
    """x (T, E) float32 -> (T, E) float32, rounded to `dtype`, the type that travels between stages:
    a cut between two layers changes nothing.
    """
    x = x + attention_part(layer.attention, x, angles, attend)
    x = x + feed_forward(layer.feed_forward, x)
    return x.to(dtype).float()


def attention_part(part: AttentionPart, x: Tensor, angles: Angles, attend: Attend) -> Tensor:
    tokens, heads, kv_heads = len(x), part.heads, part.kv_heads
    joined = part.qkv(rms_norm(x, part.norm, part.eps))
    sizes = [heads * part.width, kv_heads * part.width, kv_heads * part.width]
    q, k, v = torch.split(joined, sizes, 1)
    q_THD = _normed(q, part.query_norm, part.width, part.eps)
    k_TKD = _normed(k, part.key_norm, part.width, part.eps)
    q_THD, k_TKD = rotate(q_THD, angles.cos, angles.sin), rotate(k_TKD, angles.cos, angles.sin)
    seen = attend(q_THD, k_TKD, v.reshape(tokens, kv_heads, part.width), part.scores)
    return _after(part.out(seen.reshape(tokens, -1)), part.after, part.eps)


def feed_forward(part: FeedForward, x: Tensor) -> Tensor:
    gate, up = part.gate_up(rms_norm(x, part.norm, part.eps)).chunk(2, 1)
    act = silu if part.activation == "silu" else gelu_tanh
    return _after(part.down(act(gate).mul_(up)), part.after, part.eps)


def _normed(x: Tensor, norm: Tensor | None, width: int, eps: float) -> Tensor:
    """x (T, heads * D) -> (T, heads, D), normed head by head or all heads together."""
    heads = x.reshape(len(x), -1, width)
    if norm is None:
        return heads
    if len(norm) == width:
        return rms_norm(heads, norm, eps)
    return rms_norm(x, norm, eps).view(heads.shape)


def _after(x: Tensor, norm: Tensor | None, eps: float) -> Tensor:
    return x if norm is None else rms_norm(x, norm, eps)
