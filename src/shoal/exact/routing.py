"""Which experts compute a token, and with what weight, in the exact class.

A router's product is small and decides a lot: weights and rows are rounded to 12 bits, not to 8.
What follows is done row by row; sums have a fixed order or are whole numbers.

T tokens · E hidden width · N experts · S experts of one token
"""

# ruff: noqa: N803 - the letters at the end of a tensor's name are its axes

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from . import native
from .numbers import exp, round_rows, sigmoid

ONE = 2.0**24  # the sum of a softmax is counted in these parts


class Linear16:
    """(T, E) float32 -> (T, N) float32: float32(sum of 12-bit codes) * weight scale * row scale
    (+ bias). `weight` is (N, E), of any float type.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        weight, bias = weight.float().contiguous(), None if bias is None else bias.float()
        library = native.load() if weight.device.type == "cpu" else None
        self._compiled = None if library is None else library.linear16(weight, bias)
        self._plain = _Plain16(weight, bias) if library is None else None

    @property
    def nbytes(self) -> int:
        return (self._compiled or self._plain).nbytes  # type: ignore[union-attr]

    def __call__(self, x_TE: Tensor) -> Tensor:
        if self._compiled is not None:
            return self._compiled(x_TE.contiguous())
        assert self._plain is not None  # noqa: S101 - one of the two is made
        return self._plain(x_TE)


class _Plain16:
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        codes, self._scale = round_rows(weight)
        self._codes_EN = codes.double().t().contiguous()
        self._bias = bias
        self.nbytes = self._codes_EN.nbytes

    def __call__(self, x_TE: Tensor) -> Tensor:
        codes, scale = round_rows(x_TE)
        sums = codes.double() @ self._codes_EN  # whole numbers below 2**53: exact
        y = sums.float().mul_(self._scale).mul_(scale[:, None])
        return y if self._bias is None else y.add_(self._bias)


@dataclass(frozen=True, slots=True)
class Routing:
    """From products to weights. `score`: softmax or sigmoid of all products, or the softmax of
    those that were chosen. With groups, only experts of the best `kept` groups can be chosen; a
    group is as good as the sum of its `group_best` best experts.
    """

    top: int
    score: Literal["softmax", "sigmoid", "chosen"] = "softmax"
    normed: bool = False  # the weights of a token add up to 1
    scale: float = 1.0
    groups: int = 1
    kept: int = 1
    group_best: int = 1


def route(
    products_TN: Tensor, how: Routing, correction_N: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Weights (T, S) float32 and experts (T, S) int64, in the order of experts.

    `correction_N` is added for the choice alone. Of equal experts the first is chosen.
    """
    scores = _scores(products_TN, how)
    choice = scores if correction_N is None else scores + correction_N
    if how.groups > 1:
        choice = choice.masked_fill(_outside(choice, how), -torch.inf)
    chosen = _best(choice, how.top).sort(-1).values
    weights = scores.gather(1, chosen)
    if how.score == "chosen":
        weights = softmax(weights)
    if how.normed:
        weights = weights / added(weights).add_(1e-20)[:, None]
    return weights.mul_(how.scale), chosen


def softmax(x: Tensor) -> Tensor:
    """Over the last axis."""
    weights = exp(x - x.amax(-1, keepdim=True))
    total = (weights * ONE).round_().double().sum(-1, keepdim=True)  # whole numbers: exact
    return weights.div_(total.float().mul_(1 / ONE))


def added(x_TS: Tensor) -> Tensor:
    """(T,): the columns one after the other."""
    total = x_TS[:, 0].clone()
    for column in x_TS.unbind(1)[1:]:
        total += column
    return total


def _scores(products: Tensor, how: Routing) -> Tensor:
    if how.score == "chosen":
        return products
    return sigmoid(products) if how.score == "sigmoid" else softmax(products)


def _best(x: Tensor, count: int) -> Tensor:
    return x.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def _outside(choice_TN: Tensor, how: Routing) -> Tensor:
    """(T, N) True for the experts of groups that are not kept."""
    groups = choice_TN.view(len(choice_TN), how.groups, -1)
    best = groups.sort(-1, descending=True).values[..., : how.group_best]
    kept = _best(added(best.flatten(0, 1)).view(len(choice_TN), -1), how.kept)
    outside = torch.ones(len(choice_TN), how.groups, dtype=torch.bool, device=kept.device)
    outside.scatter_(1, kept, False)
    return outside.repeat_interleave(groups.shape[-1], 1)
