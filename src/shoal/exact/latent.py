"""Attention over latents (MLA) in the exact class: one small row a token instead of all its heads.

What is cached of a token is a latent, from which all heads' keys and values come, and one rotated
key for all heads. Queries that have been taken into the space of latents meet both; the result is a
sum of latents. Latents and rotated keys are of different sizes, so each has its own scale.

B rows of N new tokens each · S places for tokens of context · H heads
R width of latents · P of rotated keys · D = R + P
"""

# ruff: noqa: N803 - the letters at the end of a tensor's name are its axes

from __future__ import annotations

import torch
from torch import Tensor

from .attention import MOST_SCORES, Context, hidden_places, products, weighted


def attend_latents(
    q_BNHD: Tensor, positions_BN: Tensor, context: Context, scaling: float
) -> Tensor:
    """(B, N, H, R) float32. The context's keys are latents (B, S, 1, R), its values rotated keys
    (B, S, 1, P).
    """
    rows, count, heads, _ = q_BNHD.shape
    hidden = hidden_places(positions_BN, context, None)
    step = max(1, MOST_SCORES // (rows * heads * context.keys.shape[1]))
    parts = [
        _attend(q_BNHD[:, at : at + step], hidden[:, at : at + step], context, scaling)
        for at in range(0, count, step)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _attend(q_BNHD: Tensor, hidden_BNS: Tensor, context: Context, scaling: float) -> Tensor:
    rank = context.keys.shape[3]
    scores = products(q_BNHD[..., :rank], context.keys, context.key_scale, scaling)
    scores += products(q_BNHD[..., rank:], context.values, context.value_scale, scaling)
    return weighted(scores, hidden_BNS, context.keys, context.key_scale)
