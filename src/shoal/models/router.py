"""Reads a model's own router as one of the exact class: see `exact/routing.py`.

How products become choices and weights is found by trial: of the ways that are known, the one that
gives what the model's own code gives on random rows. A router that does something else is refused.

T tokens · E hidden width · N experts · S experts of one token
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModel
from ..exact.routing import Linear16, Routing, route

SCALES = ("routed_scaling_factor", "router_scaling_factor", "route_scale")
CORRECTION = "e_score_correction_bias"
TRIALS = 64  # rows
MATCHING = 60  # of those: rounding may decide between two experts that are nearly equal
TOLERANCE = 1e-4
SCORES: tuple[Literal["softmax", "sigmoid", "chosen"], ...] = ("softmax", "sigmoid", "chosen")


class ExactRouter(nn.Module):
    """Stands in for a router: (..., E) -> products (T, N), weights (T, S), experts (T, S).

    Raises UnsupportedModel for a router that is not understood.
    """

    def __init__(self, router: Any) -> None:
        super().__init__()
        self.routing = read_routing(router)
        self.exact = Linear16(router.weight.detach(), getattr(router, "bias", None))
        self.register_buffer(CORRECTION, getattr(router, CORRECTION, None))

    def forward(
        self, hidden_states: Tensor, correction: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        products = self.exact(hidden_states.reshape(-1, hidden_states.shape[-1]).float())
        held: Tensor | None = getattr(self, CORRECTION)
        weights, chosen = route(products, self.routing, held if correction is None else correction)
        return products, weights, chosen

    @property
    def kept_bytes(self) -> int:
        return self.exact.nbytes

    def extra_repr(self) -> str:
        return str(self.routing)


@dataclass(frozen=True, slots=True, eq=False)
class _Trial:
    """What the model's own code makes of random rows: experts in ascending order."""

    products: Tensor
    weights: Tensor
    chosen: Tensor
    correction: Tensor | None


@torch.no_grad()
def read_routing(router: Any) -> Routing:
    weight = getattr(router, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise _unknown(router, "its weight is not one matrix")
    trial = _try(router)
    ways = list(_ways(router, trial.chosen.shape[1], trial.products.shape[1]))
    matching = [_matching(trial, how) for how in ways]
    if max(matching) < MATCHING:
        raise _unknown(router, "it chooses in a way that is not known")
    return ways[matching.index(max(matching))]


def _try(router: Any) -> _Trial:
    own = copy.deepcopy(router).float().cpu()
    chance = torch.Generator().manual_seed(0)
    rows = torch.randn(TRIALS, own.weight.shape[1], generator=chance)
    rows /= (rows @ own.weight.t()).std().clamp(min=1e-12)  # scores that differ, none saturated
    correction = torch.rand(len(own.weight), generator=chance) * 0.2
    asks = len(inspect.signature(own.forward).parameters) > 1
    holds = getattr(own, CORRECTION, None) is not None
    if holds:
        getattr(own, CORRECTION).copy_(correction)
    answer = own(rows, correction) if asks else own(rows)
    if not _is_answer(answer):
        raise _unknown(router, "it does not answer with products, weights and experts")
    products, weights, chosen = (part.reshape(TRIALS, -1) for part in answer)
    _check_products(router, own, rows, products)
    chosen, order = chosen.sort(-1)
    used = correction if asks or holds else None
    return _Trial(products.float(), weights.float().gather(1, order), chosen, used)


def _is_answer(answer: object) -> bool:
    if not isinstance(answer, tuple) or len(answer) != 3:
        return False
    _, weights, chosen = answer
    whole = [part.dtype == torch.int64 for part in answer]
    return whole == [False, False, True] and bool(chosen.shape == weights.shape)


def _check_products(router: Any, own: Any, rows: Tensor, products: Tensor) -> None:
    exact = Linear16(own.weight, getattr(own, "bias", None))(rows)
    if exact.shape != products.shape or (exact - products).norm() > 0.01 * products.norm():
        raise _unknown(router, "its products are not those of its rows and its weight")


def _ways(router: Any, top: int, experts: int) -> Iterator[Routing]:
    scales = {float(value) for name, value in vars(router).items() if name in SCALES}
    groups = int(getattr(router, "num_group", getattr(router, "n_group", 1)) or 1)
    kept = int(getattr(router, "topk_group", 1) or 1)
    grouped = [(groups, kept, best) for best in (1, 2) if 1 < groups <= experts // best]
    for score, normed, scale, (count, few, best) in product(
        SCORES, (False, True), sorted({1.0} | scales), [(1, 1, 1), *grouped]
    ):
        yield Routing(top, score, normed, scale, count, few, best)


def _matching(trial: _Trial, how: Routing) -> int:
    """For how many rows this is what the model's own code computes."""
    weights, chosen = route(trial.products, how, trial.correction)
    close = (weights - trial.weights).abs() <= TOLERANCE * trial.weights.abs() + 1e-7
    return int(((chosen == trial.chosen) & close).all(1).sum())


def _unknown(router: nn.Module, why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"the choices of {type(router).__name__} cannot be made exact: {why}",
        hint="a float type works: --quant none",
    )
