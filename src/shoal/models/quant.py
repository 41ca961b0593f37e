"""Gives a model the linear layers of the exact class: see `exact/linear.py`.

Weights are rounded per output channel to 8 bits, or in groups of 32 to 4 bits; activations per row
(one scale for each token); sums are integers. A row's bits are the same alone and in any batch, at
any place, with any thread count and on any CPU.
"""

# M rows · K inputs · N outputs

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ..exact.fp4 import as_fp4
from ..exact.linear import Linear
from ..exact.weights import Weight, quantise_int4, quantise_int8
from ..units import Quant
from .replaced import ReplacedLinear

Quantise = Callable[[Tensor, Tensor | None], Linear]  # (weight (N, K), bias (N,) or None)


def quantise(kind: Quant) -> Quantise:
    """How a weight of this kind becomes an exact linear layer, on the weight's device; rounded on
    the CPU, so that it is the same everywhere.
    """
    rounded = _in_4_bits if kind == "int4" else quantise_int8
    return lambda weight, bias: Linear(
        rounded(weight.detach().cpu()).to(weight.device), None if bias is None else bias.detach()
    )


def _in_4_bits(weight: Tensor) -> Weight:
    """Weights that were published as 4-bit floats stay what they are."""
    return as_fp4(weight) or quantise_int4(weight)


class ExactLinear(ReplacedLinear):
    """Replaces one nn.Linear for inference: (..., K) -> (..., N) in the input's dtype.

    The result is float32(integer sum) * weight scale * row scale + bias, multiplied and rounded in
    this order. No gradient flows through it. The relative error on Gaussian data is 1.0-1.3 %.
    """

    def __init__(self, linear: nn.Linear, quantise: Quantise) -> None:
        super().__init__(linear)
        self.exact = quantise(linear.weight, linear.bias)

    @property
    def kept_bytes(self) -> int:
        return self.exact.nbytes

    def forward(self, x: Tensor) -> Tensor:
        y = self.exact(x.reshape(-1, self.in_features).float())
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        way = type(self.exact.compiled or self.exact.product).__name__
        return f"{self.in_features}, {self.out_features}, bias={self.exact.bias is not None}, {way}"


def quantise_linears(model: nn.Module, kind: Quant) -> int:
    """Replace every nn.Linear below `model` in place; returns how many.

    Subclasses of nn.Linear are left alone: they may compute something else.
    """
    made: dict[nn.Linear, ExactLinear] = {}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                if child not in made:
                    made[child] = ExactLinear(child, quantise(kind))
                setattr(parent, name, made[child])
    return len(made)
