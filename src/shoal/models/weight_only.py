"""Linear layers whose weights are small and whose arithmetic is float: the classes w8 and w4.

Weights are rounded to 8 bits with a scale for each output, or to 4 bits with a scale and an offset
for 32 neighbours; activations stay as they are. For GPUs, where a token takes as long as its
weights take to be read. Float results: a row's bits depend on the batch and on the machine.
"""

# M rows · K inputs · N outputs · G = K / 32 groups

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as float_linear

from ..errors import UnsupportedModel
from .absorbed import FloatHeads, absorb
from .replaced import ReplacedLinear

Kind = Literal["w8", "w4"]
GROUP = 32
LARGEST, LEVELS = 127, 15
SMALLEST_STEP = 1e-6
FEW_ROWS = 16  # up to here reading the weights takes longest; more rows expand them once
INNER_TILES = 2  # of the CUDA layout: K must be a multiple of 16 times as many


class WeightOnly8(ReplacedLinear):
    """Replaces one nn.Linear for inference, on its device."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        weight = linear.weight.detach()
        scale = weight.abs().amax(1).float().clamp_(min=SMALLEST_STEP).div_(LARGEST)
        self.scale = scale.to(weight.dtype)
        rounded = (weight.float() / self.scale.float()[:, None]).round_()
        self.codes = rounded.clamp_(-LARGEST, LARGEST).to(torch.int8)
        self.bias = None if linear.bias is None else linear.bias.detach()

    @property
    def kept_bytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        if len(rows) <= FEW_ROWS and has_packed_8(rows.device.type, rows.dtype):
            y = torch._weight_int8pack_mm(rows.contiguous(), self.codes, self.scale)
        else:
            y = float_linear(rows, self.codes.to(rows.dtype)).mul_(self.scale)
        y = y if self.bias is None else y.add_(self.bias)
        return y.view(*x.shape[:-1], self.out_features)


class WeightOnly4(ReplacedLinear):
    """Replaces one nn.Linear for inference, on its device. K is a multiple of 32."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        weight = linear.weight.detach()
        codes, step, middle = rounded_4_bits(weight)
        self._packs = _fits_packed_4(weight)
        self._packed = _packed_4(codes) if self._packs else codes[:, ::2] | (codes[:, 1::2] << 4)
        self._steps = torch.stack((step.t(), middle.t()), 2).contiguous()  # (G, N, 2)
        self.bias = None if linear.bias is None else linear.bias.detach()

    @property
    def kept_bytes(self) -> int:
        return self._packed.nbytes + self._steps.nbytes

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        if self._packs:
            y = _product_4(rows.contiguous(), self._packed, self._steps)
        else:
            y = float_linear(rows, self._expanded())
        y = y if self.bias is None else y.add_(self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def _expanded(self) -> Tensor:
        step, middle = self._steps.transpose(0, 1).unbind(2)  # (N, G)
        codes = torch.stack((self._packed & 15, self._packed >> 4), 2).flatten(1)
        grouped = codes.to(step.dtype).sub_(8).view(self.out_features, -1, GROUP)
        return grouped.mul_(step[..., None]).add_(middle[..., None]).flatten(1)


def rounded_4_bits(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """weight (N, K) -> codes (N, K) uint8 in 0..15, step and middle (N, G) in its dtype:
    weight ~ (code - 8) * step + middle.
    """
    groups = weight.float().view(len(weight), -1, GROUP)
    lowest, highest = groups.aminmax(dim=2)
    step = (highest - lowest).div_(LEVELS).clamp_(min=SMALLEST_STEP).to(weight.dtype)
    middle = lowest.add_(step.float(), alpha=8).to(weight.dtype)
    codes = (groups - middle.float()[..., None]).div_(step.float()[..., None]).round_().add_(8)
    return codes.clamp_(0, LEVELS).to(torch.uint8).flatten(1), step, middle


# ---- torch's own products, where they work


@functools.cache
def has_packed_8(device: str, dtype: torch.dtype) -> bool:
    """Whether torch multiplies with 8-bit weights there, and rightly."""
    codes = torch.arange(-64, 64, dtype=torch.int8).view(2, 64).repeat(32, 1)
    x = torch.linspace(-1, 1, 128).view(2, 64)
    try:
        y = torch._weight_int8pack_mm(
            x.to(device, dtype), codes.to(device), torch.ones(64, dtype=dtype, device=device)
        )
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return torch.allclose(y.float().cpu(), x @ codes.float().t(), rtol=0.02, atol=1.0)


def _fits_packed_4(weight: Tensor) -> bool:
    outputs, inputs = weight.shape
    fits = outputs % 64 == 0 and inputs % (16 * INNER_TILES) == 0
    return fits and weight.dtype == torch.bfloat16 and has_packed_4(weight.device.type)


@functools.cache
def has_packed_4(device: str) -> bool:
    """Whether torch multiplies bf16 rows with 4-bit weights there, and rightly."""
    places = torch.arange(64, device=device)
    codes = (7 * places + 3 * places[:, None]).remainder(16).to(torch.uint8)
    steps = torch.ones(2, 64, 2, dtype=torch.bfloat16, device=device)
    x = torch.linspace(-1, 1, 128, device=device).view(2, 64).bfloat16()
    try:
        y = _product_4(x, _packed_4(codes), steps)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    expected = float_linear(x.float(), codes.float() - 7.0)
    return torch.allclose(y.float(), expected, rtol=0.02, atol=1.0)


def _packed_4(codes: Tensor) -> Tensor:
    """In torch's own layout for the codes' device, which a product must be given."""
    if codes.device.type == "cpu":
        return torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    pairs = (codes[:, ::2] << 4) | codes[:, 1::2]
    return torch._convert_weight_to_int4pack(pairs, INNER_TILES)


def _product_4(rows: Tensor, packed: Tensor, steps: Tensor) -> Tensor:
    on_cpu = rows.device.type == "cpu"
    multiply = torch._weight_int4pack_mm_for_cpu if on_cpu else torch._weight_int4pack_mm
    return multiply(rows, packed, GROUP, steps)


# ---- in place of a model's own


class WeightOnlyParts:
    """The `Ready` of loading.py: rounds each layer as it comes, and the head to 8 bits. Raises
    UnsupportedModel for weights that no nn.Linear holds.
    """

    def __init__(self, kind: Kind) -> None:
        self._kind: Kind = kind

    def __call__(self, part: Any, index: int | None) -> None:
        if index is None:
            if type(part.lm_head) is nn.Linear:
                part.lm_head = WeightOnly8(part.lm_head)
            return
        absorb(part, exact=False)
        round_linears(part, self._kind)
        for module in part.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() > 2 and not isinstance(module, FloatHeads | nn.Conv1d):
                    raise UnsupportedModel(
                        f"{type(module).__name__} keeps {name} in a way that {self._kind} cannot "
                        "round, such as all experts in one",
                        hint="take --quant int8 or int4, which can, or a float type: --quant none",
                    )


def round_linears(part: nn.Module, kind: Kind) -> None:
    """Replace every nn.Linear below `part` in place. Those whose inputs do not come in whole groups
    get 8 bits.
    """
    for parent in list(part.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                in_4 = kind == "w4" and child.in_features % GROUP == 0
                setattr(parent, name, WeightOnly4(child) if in_4 else WeightOnly8(child))
