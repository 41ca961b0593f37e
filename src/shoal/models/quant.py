"""8-bit linear layers whose results do not depend on what else is computed with them.

Weights are rounded per output channel, activations per row (one scale for each token), sums are
integers: a row's bits are the same alone and in any batch, at any place, with any thread count and
on any CPU. This is the exact compute class.

Only `nn.Linear` is replaced. Routers and fused expert tensors of mixture-of-experts models are no
`nn.Linear` and stay float, so for those models only the attention and shared parts are exact.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..exact.linear import Linear
from ..exact.weights import quantise_int8


class Int8Linear(nn.Module):
    """Replaces one nn.Linear for inference: (..., K) -> (..., N) in the input's dtype.

    The result is float32(integer sum) * weight scale * row scale + bias, multiplied and rounded in
    this order. No gradient flows through it. The relative error on Gaussian data is 1.0-1.3 %.
    Built on the device of `linear`, it stays there and is neither saved nor copied.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = quantise_int8(linear.weight.detach())
        self.exact = Linear(weight, None if linear.bias is None else linear.bias.detach())
        self._stand_in = torch.full_like(linear.weight.detach()[:1, :1], torch.nan)

    @property
    def weight(self) -> Tensor:
        """Tells models that ask which shape, dtype and device the float weight had; all NaN."""
        return self._stand_in.expand(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        y = self.exact(x.reshape(-1, self.in_features).float())
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        way, bias = type(self.exact.product).__name__, self.exact.bias is not None
        return f"{self.in_features}, {self.out_features}, bias={bias}, {way}"


def quantise_linears(model: nn.Module) -> int:
    """Replace every nn.Linear below `model` in place, the head too; returns how many.

    A head tied to the embedding gets its own 8-bit copy and the embedding stays float. Subclasses
    of nn.Linear are left alone: they may compute something else.
    """
    made: dict[nn.Linear, Int8Linear] = {}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                if child not in made:
                    made[child] = Int8Linear(child)
                setattr(parent, name, made[child])
    return len(made)
