"""Whether a device other than the CPU gives the CPU's bits: asked of the device, not of a table."""

# T rows · E width · H heads · K kv heads

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .attention import Context, Scores, attend
from .linear import Linear
from .numbers import gelu_tanh, rms_norm, rotate, round_rows, sigmoid, silu, tanh
from .routing import Linear16, Routing, route
from .weights import FP4_TABLE, Int4Weight, quantise_int4, quantise_int8

Piece = Callable[[torch.device], Iterator[Tensor]]


@functools.cache
def computes_exactly(device: str) -> bool:
    """Self-test, once: a second. False where the device lacks an operation, too."""
    if device == "cpu":
        return True
    try:
        return all(_agrees(piece, torch.device(device)) for piece in PIECES)
    except (RuntimeError, TypeError, NotImplementedError):
        return False


def _agrees(piece: Piece, device: torch.device) -> bool:
    pairs = zip(piece(device), piece(torch.device("cpu")), strict=True)
    return all(torch.equal(one.cpu(), other) for one, other in pairs)


def _noise(*shape: int) -> Tensor:
    """The same on every device: made on the CPU. Of sizes from 1e-3 to 1e3."""
    chance = torch.Generator().manual_seed(sum(shape))
    sizes = torch.rand(shape, generator=chance).mul_(6).sub_(3)
    return torch.randn(shape, generator=chance) * 10.0**sizes


def _numbers(device: torch.device) -> Iterator[Tensor]:
    x = _noise(64, 999).to(device)
    yield rms_norm(x, _noise(999).to(device), 1e-6)
    for function in (silu, gelu_tanh, sigmoid, tanh):
        yield function(x)
    yield from round_rows(x)
    angles = _noise(64, 20)
    yield rotate(x[:, :990].reshape(64, 11, 90), angles.cos().to(device), angles.sin().to(device))


def _linears(device: torch.device) -> Iterator[Tensor]:
    weight, bias = _noise(123, 1000), _noise(123).to(device)
    four = quantise_int4(weight)
    floats = Int4Weight(four.codes, four.multipliers.clamp(max=8), four.scale, FP4_TABLE)
    for kept in (quantise_int8(weight), four, floats):
        linear = Linear(kept.to(device), bias)
        for rows in (1, 7, 70):
            yield linear(_noise(rows, 1000).to(device))


def _attention(device: torch.device) -> Iterator[Tensor]:
    keys, key_scale = round_rows(_noise(2, 384, 2, 40).clamp_(-9, 9))
    values, value_scale = round_rows(_noise(2, 384, 2, 40))
    context = Context(
        torch.tensor([0, 128], device=device),
        keys.to(device, torch.int16),
        key_scale.to(device),
        values.to(device, torch.int16),
        value_scale.to(device),
    )
    q = _noise(2, 5, 6, 40).to(device)
    positions = torch.tensor([[300, 301, 302, 303, 304], [500, 501, 502, 503, 504]], device=device)
    for how in (
        Scores(0.16),
        Scores(0.16, window=99, sinks=_noise(6).to(device), softcap=30.1),
    ):
        yield attend(q, positions, context, how)


def _routing(device: torch.device) -> Iterator[Tensor]:
    products = Linear16(_noise(16, 300).to(device))(_noise(33, 300).to(device))
    yield products
    for how in (Routing(4, normed=True), Routing(4, "sigmoid", True, 2.5, 4, 2, 2)):
        yield from route(products, how)


PIECES: tuple[Piece, ...] = (_numbers, _linears, _attention, _routing)
