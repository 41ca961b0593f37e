"""Attention of one row over its own context, unpadded: no neighbour changes a request's bits.

N new tokens of one row · S tokens it may see · H heads · K kv heads · G = H / K
D head width of queries and keys · W of values · R of latents · P of rotated keys
"""

# ruff: noqa: N803, N806 - the letters at the end of a tensor's name are its axes

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention


@dataclass(frozen=True, slots=True)
class Scores:
    """How a layer turns products of queries and keys into weights, beyond the plain softmax."""

    scaling: float | None = None
    window: int | None = None  # a token sees itself and window - 1 before
    sinks: Tensor | None = None  # (H,) a score that takes weight and gives nothing (gpt_oss)
    softcap: float | None = None  # tanh limit of the scores (gemma2)

    @property
    def plain(self) -> bool:
        return self.sinks is None and self.softcap is None


FEW = 8  # tokens
MOST_SCORES = 1 << 24  # at a time, of latents
TILE = 4  # rows; torch's float32 products of other heights depend on the number of threads


def attend_row(
    q_NHD: Tensor, k_1KSD: Tensor, v_1KSW: Tensor, mask_NS: Tensor | None, how: Scores
) -> Tensor:
    """Returns (N, H, W). Without a mask one token sees everything; several are causal, N == S.

    On a CPU the bits depend on nothing but the arguments. `scaled_dot_product_attention` of few
    tokens depends on the number of threads, too (one bfloat16 token excepted): not used for those.
    """
    count, heads, width = q_NHD.shape
    kv_heads = k_1KSD.shape[1]
    single = count == 1 and q_NHD.dtype == torch.bfloat16
    if not how.plain or (count < FEW and not single and not q_NHD.is_cuda):
        return _attend_by_hand(q_NHD, k_1KSD, v_1KSW, mask_NS, how)
    if count == 1 and mask_NS is None:  # heads that share keys stand in for queries: no repeating
        grouped = q_NHD.reshape(1, kv_heads, heads // kv_heads, width)
        out = scaled_dot_product_attention(grouped, k_1KSD, v_1KSW, scale=how.scaling)
        return out.reshape(1, heads, -1)
    out = scaled_dot_product_attention(
        q_NHD.transpose(0, 1)[None],
        k_1KSD,
        v_1KSW,
        attn_mask=mask_NS,
        is_causal=mask_NS is None,
        scale=how.scaling,
        enable_gqa=kv_heads != heads,
    )
    return out[0].transpose(0, 1)


def attend_latents(
    q_NHD: Tensor, latents_SR: Tensor, turned_SP: Tensor, mask_NS: Tensor | None, scaling: float
) -> Tensor:
    """Returns (N, H, R): sums of latents, which are keys too, together with rotated keys. Without a
    mask one token sees everything.
    """
    count, heads, _ = q_NHD.shape
    seen, rank = latents_SR.shape
    step = max(1, MOST_SCORES // (heads * seen))
    parts = []
    for at in range(0, count, step):
        q = q_NHD[at : at + step].reshape(1, -1, q_NHD.shape[2])
        scores = _product(q[..., :rank], latents_SR.t()[None])
        scores = (scores + _product(q[..., rank:], turned_SP.t()[None])) * scaling
        if mask_NS is not None:
            hidden = ~mask_NS[at : at + step].repeat_interleave(heads, 0)
            scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
        weights = torch.softmax(scores, -1, dtype=torch.float32).to(latents_SR.dtype)
        parts.append(_product(weights, latents_SR[None]).view(-1, heads, rank))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def attend_batch(
    q_BHD: Tensor, k_BSKD: Tensor, v_BSKW: Tensor, seen_BS: Tensor, how: Scores
) -> Tensor:
    """Returns (B, H, W): one token of each of B rows, in one call, as GPUs want it. `seen_BS` is
    True where a row may look; contexts are filled up to S.
    """
    rows, heads, width = q_BHD.shape
    keys, values = k_BSKD.transpose(1, 2), v_BSKW.transpose(1, 2)
    q_BKGD = q_BHD.reshape(rows, keys.shape[1], -1, width)
    seen = seen_BS[:, None, None]
    if how.plain:  # heads that share keys stand in for queries: no repeating
        out = scaled_dot_product_attention(q_BKGD, keys, values, attn_mask=seen, scale=how.scaling)
        return out.reshape(rows, heads, -1)
    scores = q_BKGD @ keys.transpose(2, 3)
    scores = scores * (width**-0.5 if how.scaling is None else how.scaling)
    if how.softcap is not None:
        scores = torch.tanh(scores / how.softcap) * how.softcap
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    if how.sinks is not None:
        sinks = how.sinks.to(scores.dtype).view(1, keys.shape[1], -1, 1)
        scores = torch.cat([scores, sinks.expand(rows, -1, -1, 1)], -1)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(values.dtype)
    out = weights[..., : keys.shape[2]] @ values
    return out.reshape(rows, heads, -1)


def attend_latents_batch(
    q_BHD: Tensor, latents_BSR: Tensor, turned_BSP: Tensor, seen_BS: Tensor, scaling: float
) -> Tensor:
    """Returns (B, H, R): `attend_latents` for one token of each of B rows."""
    rank = latents_BSR.shape[2]
    scores = q_BHD[..., :rank] @ latents_BSR.transpose(1, 2)
    scores = (scores + q_BHD[..., rank:] @ turned_BSP.transpose(1, 2)) * scaling
    scores = scores.masked_fill(~seen_BS[:, None], torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(latents_BSR.dtype)
    return weights @ latents_BSR


def _attend_by_hand(
    q_NHD: Tensor,
    k_1KSD: Tensor,
    v_1KSW: Tensor,
    mask_NS: Tensor | None,
    how: Scores,
) -> Tensor:
    count, heads, width = q_NHD.shape
    keys, values = k_1KSD[0], v_1KSW[0]
    kv_heads, seen = keys.shape[:2]
    queries = q_NHD.transpose(0, 1).reshape(kv_heads, -1, width)
    scores = _product(queries, keys.transpose(1, 2)).reshape(heads, count, seen)
    scores = scores * (width**-0.5 if how.scaling is None else how.scaling)
    if how.softcap is not None:
        scores = torch.tanh(scores / how.softcap) * how.softcap
    if mask_NS is None and count > 1:
        mask_NS = torch.ones(count, seen, dtype=torch.bool, device=keys.device).tril_()
    if mask_NS is not None:
        scores = scores.masked_fill(~mask_NS, torch.finfo(scores.dtype).min)
    if how.sinks is not None:
        sinks = how.sinks.to(scores.dtype).view(heads, 1, 1).expand(heads, count, 1)
        scores = torch.cat([scores, sinks], -1)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(values.dtype)[..., :seen]
    out = _product(weights.reshape(kv_heads, -1, seen), values)
    return out.reshape(heads, count, -1).transpose(0, 1)


def _product(rows_KRX: Tensor, matrix_KXY: Tensor) -> Tensor:
    """(K, R, Y); computed in whole tiles of rows."""
    rows = rows_KRX.shape[1]
    if rows % TILE:
        rows_KRX = pad(rows_KRX, (0, 0, 0, TILE - rows % TILE))
    return torch.matmul(rows_KRX, matrix_KXY)[:, :rows]
