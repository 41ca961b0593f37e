"""8-bit linear layers whose results do not depend on what else is computed with them.

Weights are rounded per output channel, activations per row (one scale for each token), sums are
integers: a row's bits are the same alone and in any batch, at any place, with any thread count and
on any CPU. This is the exact compute class.

Only `nn.Linear` is replaced. Routers and fused expert tensors of mixture-of-experts models are no
`nn.Linear` and stay float, so for those models only the attention and shared parts are exact.
"""

# M rows · K inputs · N outputs

from __future__ import annotations

import torch
from torch import Tensor, nn

from .int8_product import ZERO, Product, product_for

LARGEST = 127
TINIEST = 1e-12  # a row of zeros gets this scale instead of a division by zero
ROWS_AT_ONCE = 4096  # weights are rounded in blocks: a vocabulary is never held in float32 whole


class Int8Linear(nn.Module):
    """Replaces one nn.Linear for inference: (..., K) -> (..., N) in the input's dtype.

    The result is float32(integer sum) * weight scale * row scale + bias, multiplied and rounded in
    this order. No gradient flows through it. The relative error on Gaussian data is 1.0-1.3 %.
    Built on the device of `linear`, it stays there and is neither saved nor copied.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        codes, scale = quantise_weight(linear.weight.detach())
        self.product: Product = product_for(codes, scale)
        self.bias = None if linear.bias is None else linear.bias.detach().float()
        self._stand_in = torch.full_like(linear.weight.detach()[:1, :1], torch.nan)

    @property
    def weight(self) -> Tensor:
        """Tells models that ask which shape, dtype and device the float weight had; all NaN."""
        return self._stand_in.expand(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        codes, scale = quantise_rows(x.reshape(-1, self.in_features).float())
        y = self.product(codes).mul_(scale)
        if self.bias is not None:
            y.add_(self.bias)
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        way = type(self.product).__name__
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {way}"


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, K) float32 -> codes (M, K) uint8 in 1..255, scale (M, 1); x ~ (codes - 128) * scale."""
    scale = x.abs().amax(1, keepdim=True).clamp_(min=TINIEST).div_(LARGEST)
    return (x / scale).add_(ZERO + 0.5).to(torch.uint8), scale  # adding 0.5 and cutting rounds


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (N, K) of any float dtype -> codes (N, K) int8 in -127..127, scale (N,) float32."""
    blocks = [_quantise_block(block.float()) for block in torch.split(weight, ROWS_AT_ONCE)]
    return torch.cat([codes for codes, _ in blocks]), torch.cat([scale for _, scale in blocks])


def _quantise_block(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.abs().amax(1).clamp_(min=TINIEST).div_(LARGEST)
    return (weight / scale[:, None]).round_().to(torch.int8), scale


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
