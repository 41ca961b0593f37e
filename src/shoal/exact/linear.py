"""A linear layer in the exact class: y = float32(integer sum) * weight scale * row scale + bias.

The compiled library multiplies when it is there; torch does otherwise, with the same bits.
"""

# M rows · K inputs · N outputs

from __future__ import annotations

import torch
from torch import Tensor

from . import native
from .product import Expanding, Product, product_for
from .weights import Int4Weight, Int8Weight, Weight, quantise_rows


class Linear:
    """(M, K) float32 -> (M, N) float32. Cannot be saved or copied."""

    def __init__(self, weight: Weight, bias: Tensor | None = None) -> None:
        self.outputs, self.inputs = weight.shape
        self.bias = None if bias is None else bias.float()
        self.compiled = _compiled(weight, self.bias)
        self.product: Product | None = None
        if self.compiled is not None:
            self.nbytes = self.compiled.nbytes
            return
        if isinstance(weight, Int4Weight):
            if weight.codes.device.type != "cpu":
                self.product = packed = Expanding(weight)
                self.nbytes = packed.nbytes
                return
            weight = weight.expanded()
        self.product = product_for(weight.codes, weight.scale)
        self.nbytes = weight.codes.nbytes + weight.scale.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        if self.compiled is not None:
            return self.compiled(x.contiguous())
        assert self.product is not None  # noqa: S101 - one of the two is made
        codes, scale = quantise_rows(x)
        y = self.product(codes).mul_(scale)
        return y if self.bias is None else y.add_(self.bias)


def _compiled(weight: Weight, bias: Tensor | None) -> native.NativeLinear | None:
    library = native.load()
    on_cpu = weight.codes.device.type == "cpu"
    if library is None or not on_cpu or weight.shape[1] > native.LARGEST_K:
        return None
    if isinstance(weight, Int8Weight):
        return library.linear8(weight.codes, weight.scale, bias)
    table = torch.tensor(weight.table, dtype=torch.int8)
    return library.linear4(weight.codes, table, weight.multipliers, weight.scale, bias)
