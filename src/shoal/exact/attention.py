"""Attention of one row over its own context, in the exact class.

Queries, keys and values are rounded to 12 bits with a scale for each token and head, the weights of
128 neighbouring tokens to 13 bits with a scale of their own. Products are summed as integers; the
sums of the blocks are added in the order of positions. So a token's result depends on nothing but
its query and its context: not on how the prompt was cut, on the batch, on threads or pages.

N new tokens of one row · S tokens of context, from position `first` · B blocks of 128 positions
H heads · K kv heads · G = H / K · D width of queries and keys · W of values
"""

# ruff: noqa: N803 - the letters at the end of a tensor's name are its axes

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from .numbers import exp, round_rows, tanh

BLOCK = 128  # tokens: 8191 * 2047 * 128 < 2**31
WEIGHT_LIMIT = 8191
SMALLEST_WEIGHT = 1e-20  # of the largest in a context; blocks of less count as nothing
ONE = 2.0**24  # the sum of weights is counted in these parts
MOST_SCORES = 1 << 22  # at a time, in the plain form


@dataclass(frozen=True, slots=True)
class Scores:
    """How a layer turns products of queries and keys into weights, beyond the plain softmax."""

    scaling: float
    window: int | None = None  # a token sees itself and window - 1 before
    sinks: Tensor | None = None  # (H,) float32: a score that takes weight and gives nothing
    softcap: float | None = None  # tanh limit of the scores


@dataclass(frozen=True, slots=True)
class Context:
    """What one row may look at: keys (S, K, D) and values (S, K, W) as int16 codes, and their
    scales (S, K) float32. The first of them is at position `first`.
    """

    first: int
    keys: Tensor
    key_scale: Tensor
    values: Tensor
    value_scale: Tensor


def attend(q_NHD: Tensor, start: int, context: Context, how: Scores) -> Tensor:
    """(N, H, W) float32 for queries (N, H, D) float32 at positions start .. start + N - 1, the last
    ones of the context.
    """
    count, heads, _ = q_NHD.shape
    kv_heads = context.keys.shape[1]
    codes, scale = round_rows(q_NHD)
    scale.mul_(how.scaling)
    step = max(1, MOST_SCORES // (heads // kv_heads * len(context.keys)))
    out = q_NHD.new_empty(count, heads, context.values.shape[2])
    for at in range(0, count, step):
        here = slice(at, min(at + step, count))
        mask = _mask(start + here.start, here.stop - here.start, context, how.window)
        for k in range(kv_heads):
            group = slice(k * (heads // kv_heads), (k + 1) * (heads // kv_heads))
            sinks = None if how.sinks is None else how.sinks[group]
            scores = _scores(codes[here, group], scale[here, group], context, k, how.softcap)
            out[here, group] = _weighted(scores, mask, sinks, context, k)
    return out


def _mask(start: int, count: int, context: Context, window: int | None) -> Tensor:
    """(N, S) True where a token may not look."""
    tokens = torch.arange(context.first, context.first + len(context.keys))
    own = torch.arange(start, start + count)[:, None]
    hidden = tokens > own
    return hidden if window is None else hidden | (tokens <= own - window)


def _scores(
    codes_NGD: Tensor, scale_NG: Tensor, context: Context, k: int, softcap: float | None
) -> Tensor:
    """(N, G, S) float32."""
    sums = codes_NGD.double() @ context.keys[:, k].double().t()  # whole numbers: exact
    scores = sums.float().mul_(context.key_scale[:, k]).mul_(scale_NG[..., None])
    return scores if softcap is None else tanh(scores / softcap).mul_(softcap)


def _weighted(
    scores_NGS: Tensor, mask_NS: Tensor, sinks_G: Tensor | None, context: Context, k: int
) -> Tensor:
    """(N, G, W): the values, weighted by the softmax of the scores."""
    scores = scores_NGS.masked_fill_(mask_NS[:, None], -torch.inf)
    highest = scores.amax(-1, keepdim=True)
    if sinks_G is not None:
        highest = torch.maximum(highest, sinks_G[:, None])
    weights = exp(scores - highest)
    total = (weights * ONE).round_().double().sum(-1, keepdim=True)
    if sinks_G is not None:
        total += (exp(sinks_G[:, None] - highest) * ONE).round_().double()
    blocks = _block_sums(weights.mul_(context.value_scale[:, k]), context, k)
    out = torch.zeros_like(blocks[..., 0, :])
    for block in blocks.unbind(-2):
        out += block
    return out.div_(total.float().mul_(1 / ONE))


def _block_sums(weights_NGS: Tensor, context: Context, k: int) -> Tensor:
    """(N, G, B, W) float32; blocks lie at multiples of 128 positions, whatever the context."""
    before = context.first % BLOCK
    after = -(before + weights_NGS.shape[-1]) % BLOCK
    weights = pad(weights_NGS, (before, after))
    weights = weights.view(*weights.shape[:-1], -1, BLOCK)
    values = pad(context.values[:, k].double(), (0, 0, before, after))
    values = values.view(-1, BLOCK, values.shape[-1])
    scale = weights.amax(-1, keepdim=True).clamp_(min=SMALLEST_WEIGHT).div_(WEIGHT_LIMIT)
    codes = (weights / scale).round_().double()
    sums = torch.einsum("ngbs,bsw->ngbw", codes, values)  # whole numbers below 2**31: exact
    return sums.float().mul_(scale)
