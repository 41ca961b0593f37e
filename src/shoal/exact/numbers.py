"""The arithmetic of the exact class: every step is one rounded operation or an exact integer sum.

A sum of floats depends on its order, and so on the batch, the split, the number of threads and the
processor's vector width. A sum of integers does not. So whatever is summed here is first rounded
to integers of a common scale; everything else is single float32 operations (rounded to nearest,
ties to even, never fused), written down in the order in which they happen. These functions are the
definition; `csrc/` computes the same bits faster.

T rows (tokens) · E width of a row
"""

from __future__ import annotations

import torch
from torch import Tensor

TINIEST = 1e-12  # a row of zeros gets this as its largest value: nothing is divided by zero
CODE_LIMIT = 2047  # 12 bits: products of 512 such pairs still fit a 32-bit sum
NORM_LIMIT = 32767
LOG2_E = 1.44269504
# 2**f on [-0.5, 0.5], relative error 1.9e-7: 1 + f * (EXP2[0] + f * (EXP2[1] + ...))
EXP2 = (0.693147, 0.24022242, 0.055507336, 0.009671513, 0.0013264728)
EXP_LOWEST, EXP_HIGHEST = -100.0, 126.0  # powers of two; beyond them the result stays there


def divided(x: Tensor, by: float) -> Tensor:
    """x / by, in place. Of a plain number a GPU takes the reciprocal once and multiplies by it,
    which rounds twice; a tensor it divides by.
    """
    return x.div_(
        by if x.device.type == "cpu" else torch.full((), by, dtype=x.dtype, device=x.device)
    )


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., E) float32 -> codes (..., E) float32, whole numbers in -2047..2047, and scale (...,).

    x ~ codes * scale[..., None].
    """
    scale = divided(x.abs().amax(-1).clamp_(min=TINIEST), CODE_LIMIT)
    return (x / scale[..., None]).round_(), scale


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., E) float32 times `weight` (E,) over its root mean square."""
    scale = divided(x.abs().amax(-1, keepdim=True).clamp_(min=TINIEST), NORM_LIMIT)
    total = (x / scale).round_().double().square_().sum(-1, keepdim=True)  # below 2**53: exact
    wide = scale.double()
    mean = divided(total, x.shape[-1]).mul_(wide).mul_(wide).add_(eps)
    return x.mul(mean.sqrt_().reciprocal_().float()).mul_(weight)


def exp(x: Tensor) -> Tensor:
    """e**x, float32; as 2**(x * log2 e), clamped to 2**-100 .. 2**126."""
    power = x.mul(LOG2_E).clamp_(EXP_LOWEST, EXP_HIGHEST)
    whole = power.round()
    rest = power.sub_(whole)
    result = rest * EXP2[-1]
    for coefficient in reversed(EXP2[:-1]):
        result.add_(coefficient).mul_(rest)
    exponent = whole.to(torch.int32).add_(127).bitwise_left_shift_(23)
    return result.add_(1.0).mul_(exponent.view(torch.float32))


def tanh(x: Tensor) -> Tensor:
    """1 - 2 / (e**2x + 1)."""
    return torch.full_like(x, 2.0).div_(exp(x + x).add_(1.0)).neg_().add_(1.0)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e**-x)."""
    return exp(-x).add_(1.0).reciprocal_()


def silu(x: Tensor) -> Tensor:
    """x / (1 + e**-x)."""
    return x / exp(-x).add_(1.0)


def gelu_tanh(x: Tensor) -> Tensor:
    """x / (1 + e**-2u) with u = sqrt(2/pi) (x + 0.044715 x**3)."""
    cubed = x.mul(x).mul_(x).mul_(0.044715)
    return x / exp(cubed.add_(x).mul_(-1.5957691)).add_(1.0)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (T, H, D): its first R = 2 * cos.shape[-1] entries are turned in pairs
    (i, i + R/2); cos and sin are (T, R/2).
    """
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    one, other = x[..., :half], x[..., half : 2 * half]
    turned = (one * cos - other * sin, other * cos + one * sin)
    return torch.cat((*turned, x[..., 2 * half :]), -1)
