"""Every family's mixtures: the exact form computes what the model's own code computes, and the bits
of a token do not depend on its batch.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from shoal.errors import UnsupportedModel
from shoal.exact.linear import Linear
from shoal.exact.weights import quantise_int4, quantise_int8
from shoal.models.experts import ExactExperts, read_gate, replace_experts
from shoal.models.router import ExactRouter, read_routing
from shoal.models.skeleton import causal_class, read_config

from .families import MIXTURES

GROUPED = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 1}
ALL = {
    **MIXTURES,
    "deepseek_v2 in groups": {**MIXTURES["deepseek_v2"], **GROUPED},
    "deepseek_v2 of many heads": {**MIXTURES["deepseek_v2"], "routed_scaling_factor": 16.0},
    "qwen3_moe normed": {**MIXTURES["qwen3_moe"], "norm_topk_prob": True},
}
ROUNDINGS: dict[str, Callable[[Any], Any]] = {"int8": quantise_int8, "int4": quantise_int4}


def model_of(family: str) -> Any:
    config = read_config(ALL[family])
    model = causal_class(config)._from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1, generator=generator)
    return model.eval().requires_grad_(False)


def mixtures(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "experts")]


def answer(mixture: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = mixture(x)
    result: torch.Tensor = y[0] if isinstance(y, tuple) else y
    return result


def exact(model: nn.Module, kind: str = "int8") -> int:
    return replace_experts(model, lambda w, b: Linear(ROUNDINGS[kind](w), b))


@pytest.mark.parametrize("family", ALL)
def test_exact_mixtures_compute_what_the_models_own_code_computes(family: str) -> None:
    model = model_of(family)
    x = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(1))
    before = [answer(mixture, x) for mixture in mixtures(model)]
    assert exact(model) == len(before) >= 3
    for mixture, expected in zip(mixtures(model), before, strict=True):
        error = (answer(mixture, x) - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert error.median() < 0.05  # a token whose choice is nearly even may change it


@pytest.mark.parametrize("kind", ROUNDINGS)
@pytest.mark.parametrize("family", ALL)
def test_a_token_has_the_same_bits_alone_and_in_any_batch(family: str, kind: str) -> None:
    model = model_of(family)
    exact(model, kind)
    x = torch.randn(1, 21, 64, generator=torch.Generator().manual_seed(2))
    for mixture in mixtures(model):
        experts = mixture.experts
        router = next(m for m in mixture.modules() if isinstance(m, ExactRouter))
        assert isinstance(experts, ExactExperts)
        given = (x, getattr(mixture, "e_score_correction_bias", None))
        _, weights, chosen = router(*given)
        together = experts(x[0], chosen, weights)
        for at in range(21):
            _, weights, chosen = router(x[:, at : at + 1], given[1])
            assert torch.equal(experts(x[0, at : at + 1], chosen, weights)[0], together[at])


def test_routing_is_told_apart_by_what_it_computes() -> None:
    v3 = read_routing(mixtures(model_of("deepseek_v3"))[0].gate)
    assert (v3.score, v3.groups, v3.kept, v3.group_best) == ("sigmoid", 2, 1, 2)
    assert (v3.normed, v3.scale) == (True, 2.5)
    grouped = read_routing(mixtures(model_of("deepseek_v2 in groups"))[0].gate)
    assert (grouped.score, grouped.groups, grouped.group_best) == ("softmax", 4, 1)
    assert not read_routing(mixtures(model_of("qwen3_moe"))[0].gate).normed
    assert read_routing(mixtures(model_of("qwen3_moe normed"))[0].gate).normed
    assert read_gate(mixtures(model_of("gpt_oss"))[0].experts).activation == "clamped"


class Odd(nn.Module):
    """Chooses the worst."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 64))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        products = x @ self.weight.t()
        weights, chosen = (-products).softmax(-1).topk(2)
        return products, weights, chosen


class Transformed(Odd):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return super().forward(x.abs())


@pytest.mark.parametrize(("router", "why"), [(Odd, "chooses in a way"), (Transformed, "products")])
def test_a_router_that_does_something_else_is_refused(router: type[Odd], why: str) -> None:
    model = model_of("qwen3_moe")
    for mixture in mixtures(model):
        mixture.gate = router()
    with pytest.raises(UnsupportedModel, match=why):
        exact(model)


def test_an_activation_that_is_not_known_is_refused() -> None:
    model = model_of("qwen3_moe")
    for mixture in mixtures(model):
        mixture.experts.act_fn = nn.ReLU()
    with pytest.raises(UnsupportedModel, match="activation"):
        exact(model)


def test_experts_kept_in_another_way_are_refused() -> None:
    model = nn.Module()
    model.experts = nn.ModuleList([nn.Linear(4, 4)])
    with pytest.raises(UnsupportedModel, match="another way"):
        exact(model)
