"""A linear layer in the exact class: y = float32(integer sum) * weight scale * row scale + bias.

The compiled library multiplies when it is there; torch does otherwise, with the same bits.
"""

# M rows · K inputs · N outputs

from __future__ import annotations

from torch import Tensor

from .product import Product, product_for
from .weights import Int4Weight, Weight, quantise_rows


class Linear:
    """(M, K) float32 -> (M, N) float32. Cannot be saved or copied."""

    def __init__(self, weight: Weight, bias: Tensor | None = None) -> None:
        self.outputs, self.inputs = weight.shape
        self.bias = None if bias is None else bias.float()
        whole = weight.expanded() if isinstance(weight, Int4Weight) else weight
        self.product: Product = product_for(whole.codes, whole.scale)
        self.nbytes = whole.codes.nbytes + whole.scale.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        codes, scale = quantise_rows(x)
        y = self.product(codes).mul_(scale)
        return y if self.bias is None else y.add_(self.bias)
