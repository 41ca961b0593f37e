"""The small pieces of a model that are no products: norms, activations, rotations; in the exact
class. Each is recognised by what it computes.

E width of a norm
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import UnsupportedModel
from ..exact.numbers import gelu_tanh, rms_norm, silu

ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (silu, gelu_tanh)
ACTIVATION_NAMES = ("act_fn", "activation_fn")
TOLERANCE = 1e-4


class ExactNorm(nn.Module):
    """x (..., E) times `scale` (E,) over its root mean square, in the dtype of x."""

    def __init__(self, scale: Tensor, eps: float) -> None:
        super().__init__()
        self.scale, self.eps = scale, eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x.float(), self.scale, self.eps).to(x.dtype)


class ExactActivation(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x.float()).to(x.dtype)


class PreciseAngles(TorchFunctionMode):
    """cos and sin through float64: their float32 values differ between processors otherwise."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.Tensor.cos, torch.Tensor.sin, torch.cos, torch.sin):
            return func(args[0].double()).float()
        if func is torch.polar:
            length, angle = args
            return func(length.double(), angle.double()).to(torch.complex64)
        return func(*args, **(kwargs or {}))


class Turns(torch.Tensor):
    """Complex numbers of length one. What is multiplied by them, is so in single float operations:
    a processor's own complex product may round otherwise.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in (torch.Tensor.mul, torch.Tensor.__mul__, torch.mul):
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        x, turns = (torch.view_as_real(arg.as_subclass(torch.Tensor)) for arg in args)
        (real, imaginary), (cos, sin) = x.unbind(-1), turns.unbind(-1)
        turned = real * cos - imaginary * sin, imaginary * cos + real * sin
        return torch.view_as_complex(torch.stack(turned, -1))


class ExactRotary(nn.Module):
    """A model's own rotary module, with precise angles. They are computed on the CPU, wherever they
    go: a GPU's cosines are others.
    """

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary.cpu()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        device = next((x.device for x in given if isinstance(x, Tensor)), torch.device("cpu"))
        with PreciseAngles():
            named = {name: _on_cpu(x) for name, x in kwargs.items()}
            found = self.rotary(*map(_on_cpu, args), **named)
        if not isinstance(found, Tensor):
            return tuple(each.to(device) for each in found)
        found = found.to(device)
        return found.as_subclass(Turns) if found.is_complex() else found


def _on_cpu(x: Any) -> Any:
    """Of floats a rotary module asks only for their type."""
    if not isinstance(x, Tensor) or x.device.type == "cpu":
        return x
    return torch.empty(1, 1, dtype=x.dtype) if x.is_floating_point() else x.cpu()


def replace_pieces(part: nn.Module) -> None:
    """Replace norms and activations below `part` in place. Raises UnsupportedModel for those that
    compute something else.
    """
    for parent in list(part.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ExactNorm | ExactActivation):
                continue
            if name in ACTIVATION_NAMES:
                setattr(parent, name, read_activation(child))
            elif type(child).__name__.endswith("Norm"):
                setattr(parent, name, read_norm(child))


def read_activation(activation: nn.Module) -> ExactActivation:
    x = torch.linspace(-8, 8, 64)
    for function in ACTIVATIONS:
        if torch.allclose(function(x), activation(x), rtol=TOLERANCE, atol=TOLERANCE):
            return ExactActivation(function)
    raise _unknown(activation)


@torch.no_grad()
def read_norm(norm: Any) -> ExactNorm:
    weight = getattr(norm, "weight", None)
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, float):
        raise _unknown(norm)
    own = copy.deepcopy(norm).float().cpu()
    chance = torch.Generator().manual_seed(0)
    own.weight.copy_(torch.rand(len(weight), generator=chance) + 0.5)
    x = torch.randn(4, len(weight), generator=chance) + 0.5
    for more in (0.0, 1.0):
        exact = rms_norm(x, own.weight + more, eps)
        if torch.allclose(exact, own(x), rtol=TOLERANCE, atol=TOLERANCE):
            return ExactNorm(weight.detach().float().add(more), eps)
    raise _unknown(norm)


def _unknown(module: nn.Module) -> UnsupportedModel:
    return UnsupportedModel(
        f"{type(module).__name__} computes something that is not known, so its results cannot be "
        "made exact",
        hint="a float type works: --quant none",
    )
