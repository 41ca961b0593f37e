"""Many linear layers of one shape, each of which computes some of the rows; experts made of them.

T tokens · R rows, sorted by who computes them · S experts of one token · E hidden width
F width of the feed-forward
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from . import native
from .linear import Linear
from .numbers import exp, gelu_tanh, silu


class Grouped:
    """Rows (R, inputs) float32 -> (R, outputs): linear g computes rows bounds[g] .. bounds[g + 1].

    A row's bits are those that its linear gives it alone. `bounds` is (G + 1,) int32.
    """

    def __init__(self, linears: Sequence[Linear]) -> None:
        self.linears = tuple(linears)
        self.inputs, self.outputs = self.linears[0].inputs, self.linears[0].outputs
        self.nbytes = sum(linear.nbytes for linear in self.linears)
        self._handles = _handles(self.linears)

    def __call__(self, x: Tensor, bounds: Tensor) -> Tensor:
        y = x.new_empty(len(x), self.outputs)
        library = native.load()
        if self._handles is not None and library is not None:
            x = x.contiguous()
            count, begins = len(self.linears), bounds.data_ptr()
            library.run_rows(self._handles, count, begins, x.data_ptr(), y.data_ptr())
            return y
        for linear, (start, stop) in zip(self.linears, pairwise(bounds.tolist()), strict=True):
            if start < stop:
                y[start:stop] = linear(x[start:stop])
        return y


def _handles(linears: Sequence[Linear]) -> ctypes.Array[ctypes.c_void_p] | None:
    """What the compiled library calls them; None where it did not make all."""
    made = [linear.compiled.handle for linear in linears if linear.compiled is not None]
    return (ctypes.c_void_p * len(made))(*made) if len(made) == len(linears) else None


@dataclass(frozen=True, slots=True)
class Gate:
    """(R, 2 F), gate first -> (R, F): the activated gate times up.

    "clamped" is x * sigmoid(alpha * x) of a gate up to `limit`, times 1 + up within +-limit.
    """

    activation: Literal["silu", "gelu_tanh", "clamped"] = "silu"
    alpha: float = 1.0
    limit: float = torch.inf

    def __call__(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        if self.activation == "clamped":
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
            return (gate / exp(gate * -self.alpha).add_(1.0)).mul_(up + 1.0)
        return (silu if self.activation == "silu" else gelu_tanh)(gate).mul_(up)


class Experts:
    """The routed experts of one layer: (T, E) float32 -> (T, E) float32."""

    def __init__(self, gate_up: Sequence[Linear], down: Sequence[Linear], gate: Gate) -> None:
        self.gate_up, self.down, self.gate = Grouped(gate_up), Grouped(down), gate
        self.count = len(self.gate_up.linears)
        self.nbytes = self.gate_up.nbytes + self.down.nbytes
        self._numbers = torch.arange(self.count + 1)  # on the device of what comes

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """`chosen` (T, S) int64 and their `weights` (T, S) float32, in any order: a token's experts
        are added in the order of their numbers.
        """
        chosen, order = chosen.sort(-1)
        weights = weights.gather(1, order)
        experts, slots = chosen.flatten().sort(stable=True)
        if self._numbers.device != experts.device:
            self._numbers = self._numbers.to(experts.device)
        bounds = torch.searchsorted(experts, self._numbers, out_int32=True)
        rows = self.gate_up(x[slots // chosen.shape[1]], bounds)
        rows = self.down(self.gate(rows), bounds)
        y = torch.empty_like(rows)
        y[slots] = rows
        y = y.view(*chosen.shape, -1).mul_(weights[..., None])
        total = y[:, 0].clone()
        for other in y.unbind(1)[1:]:
            total += other
        return total
