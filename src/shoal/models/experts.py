"""Gives a mixture of experts the arithmetic of the exact class: see `exact/experts.py`.

transformers keeps the weights of a layer's experts in two tensors and says by plain attributes how
they lie. What lies between the two products is found by trial: a gate is known when it computes
what the model's own code computes, else the model is refused.

E hidden width · F width of an expert's feed-forward
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModel
from ..exact.experts import Experts, Gate
from ..exact.linear import Linear
from .quant import Quantise
from .router import ExactRouter

ROUTERS = ("gate", "router")
TOLERANCE = 1e-4


class ExactExperts(nn.Module):
    """Stands in for the experts of a layer; called as they are, by position."""

    def __init__(self, exact: Experts) -> None:
        super().__init__()
        self.exact = exact

    def forward(self, hidden_states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """(T, E) -> (T, E) in the same dtype."""
        y = self.exact(hidden_states.float(), chosen, weights.float())
        return y.to(hidden_states.dtype)

    @property
    def kept_bytes(self) -> int:
        return self.exact.nbytes

    def extra_repr(self) -> str:
        up, activation = self.exact.gate_up, self.exact.gate.activation
        return f"{self.exact.count} x {up.inputs} -> {up.outputs // 2} ({activation})"


def replace_experts(model: nn.Module, quantise: Quantise) -> int:
    """Replace all experts below `model` in place, and the routers beside them; returns how many.

    Raises UnsupportedModel for those that compute something else.
    """
    found = list(_mixtures(model))
    for parent in found:
        parent.experts = ExactExperts(read_experts(parent.experts, quantise))
        name = next((name for name in ROUTERS if hasattr(parent, name)), None)
        if name is None:
            raise _unknown(parent, "has no router that is known")
        setattr(parent, name, ExactRouter(getattr(parent, name)))
    return len(found)


def _mixtures(model: nn.Module) -> Iterator[Any]:
    for module in list(model.modules()):
        experts = getattr(module, "experts", None)
        if isinstance(experts, nn.Module) and not isinstance(experts, ExactExperts):
            yield module


def read_experts(experts: Any, quantise: Quantise) -> Experts:
    """The weights, rounded expert by expert. Raises UnsupportedModel."""
    three = [
        isinstance(getattr(experts, name, None), Tensor) and getattr(experts, name).dim() == 3
        for name in ("gate_up_proj", "down_proj")
    ]
    plain = hasattr(experts, "_apply_gate") and not getattr(experts, "has_post_expert_norm", False)
    if not plain or not all(three):
        raise _unknown(experts, "keeps its weights in another way")
    up, down = (_linears(experts, name, quantise) for name in ("gate_up_proj", "down_proj"))
    return Experts(list(up), list(down), read_gate(experts))


def _linears(experts: Any, name: str, quantise: Quantise) -> Iterator[Linear]:
    weights = getattr(experts, name).detach()
    biases = getattr(experts, f"{name}_bias", None)
    transposed = getattr(experts, "is_transposed", False)
    interleaved = name == "gate_up_proj" and not getattr(experts, "is_concatenated", True)
    for index, weight in enumerate(weights):
        weight = weight.t() if transposed else weight
        bias = None if biases is None else biases[index].detach()
        if interleaved:
            weight, bias = _apart(weight), None if bias is None else _apart(bias)
        yield quantise(weight.contiguous(), bias)


def _apart(rows: Tensor) -> Tensor:
    """Gate, up, gate, up, ... -> all of gate, then all of up."""
    return torch.cat((rows[::2], rows[1::2]))


def read_gate(experts: Any) -> Gate:
    """The gate that computes what these experts compute. Raises UnsupportedModel."""
    rows = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) * 4
    expected = experts._apply_gate(rows)
    if not getattr(experts, "is_concatenated", True):
        rows = torch.cat((rows[:, ::2], rows[:, 1::2]), 1)
    for gate in _gates(experts):
        if torch.allclose(gate(rows), expected, rtol=TOLERANCE, atol=TOLERANCE):
            return gate
    raise _unknown(experts, "has an activation that is not known")


def _gates(experts: Any) -> Iterator[Gate]:
    yield Gate()
    yield Gate("gelu_tanh")
    if hasattr(experts, "alpha") and hasattr(experts, "limit"):
        yield Gate("clamped", float(experts.alpha), float(experts.limit))


def _unknown(module: nn.Module, why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{type(module).__name__} {why}, so its results cannot be made exact",
        hint="a float type works: --quant none",
    )
