"""Weights that were published as 4-bit floats, kept as they are.

Of an MXFP4 checkpoint (gpt-oss) each weight is one of eight magnitudes times a power of two that 32
neighbours share. Rounded to other 4-bit numbers they would lose a second time; as codes of the same
eight magnitudes they lose nothing, unless a group is far smaller than its row's largest.

N outputs · K inputs · G = ceil(K / 32) groups
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .weights import FP4_TABLE, GROUP, Int4Weight

MAGNITUDES = FP4_TABLE[:8]  # whole numbers: twice those of E2M1
MOST_STEPS = 8  # 8 * 12 fits 8 bits, the next power of two does not
ONE = 127 << 1  # a float32's exponent and first bit of its fraction, of 1.0
BELOW = (1 << 22) - 1  # all other bits of the fraction
ROWS = 128  # at a time: they stay in the cache
FEW = 8  # rows that tell whether it is worth looking at all


def as_fp4(weight: Tensor) -> Int4Weight | None:
    """weight (N, K) of any float dtype; None when it is not made of such numbers."""
    if not _is_fp4(weight[:FEW]):
        return None
    blocks = torch.split(weight, ROWS)
    if not all(map(_is_fp4, blocks)):
        return None
    codes, multipliers, scale = (
        torch.cat(parts) for parts in zip(*map(_block, blocks), strict=True)
    )
    return Int4Weight(codes, multipliers, scale, FP4_TABLE)


def _groups(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Groups (N, G, 32), and a step (N, G) for each, so that its largest is 8 to 16 of them; 0 for
    zeros.
    """
    groups = pad(weight.float(), (0, -weight.shape[1] % GROUP)).view(len(weight), -1, GROUP)
    largest = groups.abs().amax(2)
    _, exponent = torch.frexp(largest)
    bits = exponent.add(127 - 4).clamp_(1, 254).bitwise_left_shift_(23)  # a power of two
    return groups, bits.view(torch.float32).mul_(largest > 0)


def _is_fp4(weight: Tensor) -> bool:
    groups, steps = _groups(weight)
    bits = _counts(groups, steps).view(torch.int32)
    place = (bits >> 22) - ONE  # 0 for 1, 1 for 1.5, 2 for 2, 3 for 3, 4 for 4, 5 for 6, ...
    fits = ((bits & BELOW) == 0) & (place >= 0) & (place != 1)
    return bool((fits | (bits == 0)).all())


def _counts(groups: Tensor, steps: Tensor) -> Tensor:
    """How many steps each weight is, without its sign. Powers of two: the quotient is exact."""
    return groups.abs().div_(steps.where(steps > 0, 1.0)[..., None])


def _block(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    groups, steps = _groups(weight)
    scale = steps.amax(1).div_(MOST_STEPS)
    scale = scale.where(scale > 0, 1.0)
    multipliers = (steps / scale[:, None]).clamp_(min=1.0)
    counts = _counts(groups, multipliers * scale[:, None])
    small = ((steps > 0) & (steps < scale[:, None])).any(1)  # rows in which a group is rounded
    counts[small] = _nearest(counts[small])
    bits = counts.view(torch.int32)
    codes = ((bits >> 22) - ONE).clamp_(min=1).mul_(bits != 0)
    codes = codes.add_(groups < 0, alpha=8).to(torch.uint8).flatten(1)
    return codes[:, : weight.shape[1]].contiguous(), multipliers.to(torch.uint8), scale


def _nearest(counts: Tensor) -> Tensor:
    magnitudes = counts.new_tensor(MAGNITUDES)
    return magnitudes[torch.bucketize(counts, (magnitudes[1:] + magnitudes[:-1]) / 2)]
