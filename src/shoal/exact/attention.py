"""Attention over cached tokens in the exact class.

Queries, keys and values are rounded to 12 bits with a scale for each token and head, the weights of
128 neighbouring tokens to 13 bits with a scale of their own. Products are summed as integers; the
sums of the blocks are added in the order of positions. So a token's result depends on nothing but
its query and its context: not on how the prompt was cut, on the batch, on padding, threads or
pages.

B rows (requests) of N new tokens each · S places for tokens of context, padding included
C = S / 128 blocks · H heads · K kv heads · G = H / K · D width of queries and keys · W of values
"""

# ruff: noqa: N803, N806 - the letters at the end of a tensor's name are its axes

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .numbers import divided, exp, round_rows, tanh

BLOCK = 128  # tokens: 8191 * 2047 * 128 < 2**31
WEIGHT_LIMIT = 8191
SMALLEST_WEIGHT = 1e-20  # of the largest in a context; blocks of less count as nothing
ONE = 2.0**24  # the sum of weights is counted in these parts
MOST_TERMS = 256  # 32 * 2047 * 256 and 64 * 2047 * 128 are below 2**24
MOST_SCORES = 1 << 22  # at a time


@dataclass(frozen=True, slots=True)
class Scores:
    """How a layer turns products of queries and keys into weights, beyond the plain softmax."""

    scaling: float
    window: int | None = None  # a token sees itself and window - 1 before
    sinks: Tensor | None = None  # (H,) float32: a score that takes weight and gives nothing
    softcap: float | None = None  # tanh limit of the scores


@dataclass(frozen=True, slots=True)
class Context:
    """Cached tokens from position `first` (B,) on, multiples of 128, as is S.

    keys (B, S, K, D), values (B, S, K, W): int16 codes; their scales (B, S, K) float32. What lies
    behind a row's newest token is not read.
    """

    first: Tensor
    keys: Tensor
    key_scale: Tensor
    values: Tensor
    value_scale: Tensor


def attend(q_BNHD: Tensor, positions_BN: Tensor, context: Context, how: Scores) -> Tensor:
    """(B, N, H, W) float32 for queries (B, N, H, D) float32 at these positions."""
    rows, count, heads, _ = q_BNHD.shape
    hidden = hidden_places(positions_BN, context, how.window)
    step = max(1, MOST_SCORES // (rows * heads * context.keys.shape[1]))
    parts = [
        _attend(q_BNHD[:, at : at + step], hidden[:, at : at + step], context, how)
        for at in range(0, count, step)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def hidden_places(positions_BN: Tensor, context: Context, window: int | None) -> Tensor:
    """(B, N, S) True where a token may not look."""
    tokens = torch.arange(context.keys.shape[1], device=positions_BN.device)
    tokens = (context.first[:, None] + tokens)[:, None]
    own = positions_BN[..., None]
    hidden = tokens > own
    return hidden if window is None else hidden.logical_or_(tokens <= own - window)


def _attend(q_BNHD: Tensor, hidden_BNS: Tensor, context: Context, how: Scores) -> Tensor:
    scores = products(q_BNHD, context.keys, context.key_scale, how.scaling)
    if how.softcap is not None:
        scores = tanh(divided(scores, how.softcap)).mul_(how.softcap)
    return weighted(scores, hidden_BNS, context.values, context.value_scale, how.sinks)


def products(q_BNHD: Tensor, keys_BSKD: Tensor, scale_BSK: Tensor, scaling: float) -> Tensor:
    """(B, K, N, G, S) float32: queries, rounded, times keys."""
    rows, count, _, width = q_BNHD.shape
    grouped = q_BNHD.reshape(rows, count, keys_BSKD.shape[2], -1, width).permute(0, 2, 1, 3, 4)
    codes, scale_BKNG = round_rows(grouped)
    keys = _floats(keys_BSKD.transpose(1, 2), width).transpose(2, 3)
    sums = _exact_product(codes.flatten(2, 3), keys, 64.0)
    scores = sums.view(*scale_BKNG.shape, -1)
    scores.mul_(scale_BSK.transpose(1, 2)[:, :, None, None])
    return scores.mul_(scale_BKNG.mul_(scaling)[..., None])


def weighted(
    scores_BKNGS: Tensor,
    hidden_BNS: Tensor,
    values_BSKW: Tensor,
    scale_BSK: Tensor,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """(B, N, H, W) float32: values, weighted by the softmax of the scores, which are used up."""
    rows, kv_heads, count, group, _ = scores_BKNGS.shape
    hidden = hidden_BNS[:, None, :, None]
    highest = scores_BKNGS.masked_fill_(hidden, -torch.inf).amax(-1, keepdim=True)
    sinks = None if sinks_H is None else sinks_H.view(kv_heads, 1, -1, 1)
    if sinks is not None:
        highest = torch.maximum(highest, sinks)
    weights = exp(scores_BKNGS.sub_(highest))
    total = (weights * ONE).round_().sum(-1, keepdim=True, dtype=torch.float64)  # whole: exact
    if sinks is not None:
        total += (exp(sinks - highest) * ONE).round_().double()
    weights.mul_(scale_BSK.transpose(1, 2)[:, :, None, None])
    out = _weighted_values(weights.masked_fill_(hidden, 0.0), values_BSKW)
    out.div_(total.float().mul_(1 / ONE))
    return out.permute(0, 2, 1, 3, 4).reshape(rows, count, kv_heads * group, -1)


def _weighted_values(weights_BKNGS: Tensor, values_BSKW: Tensor) -> Tensor:
    """(B, K, N, G, W) float32: the values of each block summed exactly, then block after block."""
    rows, kv_heads, count, group, _ = weights_BKNGS.shape
    weights = weights_BKNGS.view(rows, kv_heads, count * group, -1, BLOCK)
    scale = divided(weights.amax(-1, keepdim=True).clamp_(min=SMALLEST_WEIGHT), WEIGHT_LIMIT)
    codes = (weights / scale).round_().transpose(2, 3)
    values = _floats(values_BSKW.transpose(1, 2), BLOCK)
    values = values.view(rows, kv_heads, -1, BLOCK, values.shape[-1])
    blocks = _exact_product(codes, values, 128.0).mul_(scale.transpose(2, 3)).unbind(2)
    out: Tensor = blocks[0]
    for block in blocks[1:]:
        out = out + block
    return out.view(rows, kv_heads, count, group, -1)


def _floats(codes: Tensor, terms: int) -> Tensor:
    """As float32 where sums of so many products fit it, in one piece: a product copies it else."""
    dtype = torch.float32 if terms <= MOST_TERMS else torch.float64
    return codes.to(dtype, memory_format=torch.contiguous_format)


def _exact_product(codes: Tensor, numbers: Tensor, base: float) -> Tensor:
    """codes (..., X, Y) @ numbers (..., Y, Z), all whole: float32(integer sum).

    Float32 holds whole numbers up to 2**24, so the codes are cut into base * high + low, whose
    products with 12-bit numbers stay below that; adding the two rounds once.
    """
    if numbers.dtype == torch.float64:
        return (codes.double() @ numbers).float()
    high = (codes / base).round_()
    low = codes - high * base
    return (high @ numbers).mul_(base).add_(low @ numbers)
