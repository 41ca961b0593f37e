"""Attention and whole decoder layers in the compiled library, with the bits of `layer.py`.

A `NativeStep` says what is computed now, `NativeLayers` holds layers with their pools, and `run`
computes them all in one call. Wrong shapes, slots and pages outside the pools raise ValueError.
"""

# T new tokens, all rows together · E hidden width · H heads · K kv heads · D width · W of values
# ruff: noqa: N803 - the letters at the end of a tensor's name are its axes

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import Structure, byref, c_double, c_float, c_int, c_int64, c_void_p, sizeof
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .attention import Scores
from .layer import Angles, AttentionPart, DenseLayer, FeedForward
from .linear import Linear
from .native import Native

ERRORS = {
    1: "the shapes of its parts do not fit one another",
    2: "a slot or a page lies outside the pools",
    3: "out of memory",
}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
Part = DenseLayer | AttentionPart | FeedForward


@dataclass(frozen=True, slots=True, eq=False)
class Pools:
    """What one layer caches, a token in each slot: int16 codes, float32 scales."""

    keys: Tensor  # (slots, K, D), D at most 512
    key_scale: Tensor  # (slots, K)
    values: Tensor  # (slots, K, W)
    value_scale: Tensor  # (slots, K)


class _Cache(Structure):
    _fields_ = (
        ("slots", c_int64),
        *((name, c_int) for name in ("kv_heads", "key_width", "value_width")),
        *((name, c_void_p) for name in ("keys", "key_scale", "values", "value_scale")),
    )


class _Scores(Structure):
    _fields_ = (
        ("scaling", c_float),
        ("softcap", c_float),
        ("window", c_int64),
        ("sinks", c_void_p),
    )


class _Angles(Structure):
    _fields_ = (("half", c_int), ("cos", c_void_p), ("sin", c_void_p))


class _Step(Structure):
    _fields_ = (
        *((name, c_int) for name in ("tokens", "rows", "page_size", "tables")),
        *((name, c_void_p) for name in ("start", "count", "page_begin", "pages", "slots")),
        ("angles", c_void_p),
    )


class _Layer(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("qkv", "out", "gate_up", "down")),
        *((name, c_void_p) for name in ("attention_norm", "query_norm", "key_norm")),
        *((name, c_void_p) for name in ("attention_after", "mlp_norm", "mlp_after")),
        *((name, c_int) for name in ("query_norm_length", "key_norm_length")),
        *((name, c_int) for name in ("hidden", "heads", "angles", "activation")),
        *((name, c_double) for name in ("attention_eps", "mlp_eps")),
        ("scores", _Scores),
        ("cache", _Cache),
    )


SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "shoal_layers_run": (c_int, [c_void_p, c_int, c_void_p, c_void_p, c_int]),
    "shoal_attention": (c_int, [*[c_void_p] * 3, c_int, *[c_void_p] * 4]),
    "shoal_rms_norm": (None, [c_void_p, c_double, c_void_p, c_int, c_int, c_void_p]),
    "shoal_norm_linear": (None, [c_void_p, c_double, c_void_p, c_void_p, c_int, c_void_p]),
}


class NativeStep:
    """The rows of one step: row r has counts[r] new tokens from position starts[r] on, and its
    position p lies in slot pages[r][p // page_size] * page_size + p % page_size.

    Pages that no window reaches may be -1. slots (T,) int64: where the new tokens are cached.
    """

    def __init__(
        self,
        starts: Sequence[int],
        counts: Sequence[int],
        pages: Sequence[Sequence[int]],
        page_size: int,
        slots: Tensor,
        angles: Sequence[Angles] = (),
    ) -> None:
        self.tokens, rows = len(slots), len(starts)
        if not rows == len(counts) == len(pages):
            raise ValueError(f"{rows} starts, {len(counts)} counts, {len(pages)} lists of pages")
        begins = list(accumulate(map(len, pages), initial=0))
        flat = [page for of_row in pages for page in of_row]
        arrays = [(c_int64 * len(of))(*of) for of in (starts, counts, begins, flat)]
        tables = [_table(table, self.tokens) for table in angles]
        rotations = (_Angles * len(tables))(*tables)
        self.kept = (arrays, rotations, slots, angles)
        addresses = map(ctypes.addressof, arrays)
        into = _address(slots, torch.int64), ctypes.addressof(rotations)
        self.struct = _Step(self.tokens, rows, page_size, len(tables), *addresses, *into)


class NativeLayers:
    """A range of layers, each with its pools; parts whose linears are compiled.

    An `AttentionPart` alone adds its result to x and rounds nothing; a `FeedForward` alone needs no
    pools.
    """

    def __init__(self, native: Native, layers: Sequence[tuple[Part, Pools | None]]) -> None:
        self.kept = layers  # the library has their addresses
        self.hidden = {_hidden(part) for part, _ in layers}
        _declare(native.library)
        self._run = native.library.shoal_layers_run
        self._structs = (_Layer * len(layers))(*(_layer(part, pools) for part, pools in layers))

    def run(
        self, step: NativeStep, x: Tensor, dtype: torch.dtype, part: range | None = None
    ) -> None:
        """x (T, E) float32, in place; rounded to `dtype` after each layer with a feed-forward.
        Only the layers of `part`, counted from 0, where one is given.
        """
        part = range(len(self._structs)) if part is None else part
        if {x.shape[1]} != self.hidden or x.shape[0] != step.tokens:
            raise ValueError(f"x is {tuple(x.shape)} for {step.tokens} tokens, E = {self.hidden}")
        if not 0 <= part.start < part.stop <= len(self._structs) or part.step != 1:
            raise ValueError(f"layers {part.start}:{part.stop} of {len(self._structs)}")
        first = byref(self._structs, part.start * sizeof(_Layer))
        given = byref(step.struct), _address(x, torch.float32), DTYPES[dtype]
        _raise(self._run(first, len(part), *given))


@dataclass(frozen=True, slots=True, eq=False)
class NativeAttention:
    """Attention of one layer whose other parts run elsewhere."""

    native: Native
    pools: Pools
    how: Scores
    structs: tuple[_Cache, _Scores] = field(init=False)

    def __post_init__(self) -> None:
        _declare(self.native.library)
        object.__setattr__(self, "structs", (_cache(self.pools), _scores(self.how)))

    def __call__(self, step: NativeStep, q_THD: Tensor, k_TKD: Tensor, v_TKW: Tensor) -> Tensor:
        """(T, H, W) float32: caches k and v, then attends; q and k are normed and rotated."""
        tokens, heads, _ = q_THD.shape
        self._check(step, q_THD, k_TKD, v_TKW)
        out = q_THD.new_empty(tokens, heads, v_TKW.shape[2])
        cache, scores = self.structs
        given = [_address(x, torch.float32) for x in (q_THD, k_TKD, v_TKW, out)]
        run = self.native.library.shoal_attention
        _raise(run(byref(cache), byref(scores), byref(step.struct), heads, *given))
        return out

    def _check(self, step: NativeStep, q_THD: Tensor, k_TKD: Tensor, v_TKW: Tensor) -> None:
        tokens, heads, width = q_THD.shape
        fits = k_TKD.shape == (tokens, *self.pools.keys.shape[1:])
        fits = fits and v_TKW.shape == (tokens, *self.pools.values.shape[1:])
        fits = fits and tokens == step.tokens and width == k_TKD.shape[2]
        if not fits or (self.how.sinks is not None and len(self.how.sinks) != heads):
            raise ValueError("queries, keys and values do not fit the step and the pools")


def rms_norm(native: Native, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (T, E) float32 -> (T, E), as in `numbers.py`."""
    _declare(native.library)
    y = torch.empty_like(x)
    given = _address(x, torch.float32), *x.shape, _address(y, torch.float32)
    native.library.shoal_rms_norm(_norm(weight, x.shape[1]), eps, *given)
    return y


def norm_linear(native: Native, x: Tensor, weight: Tensor, eps: float, linear: Linear) -> Tensor:
    """x (T, E) float32 -> (T, N): the last norm and the head, of compiled linears."""
    _declare(native.library)
    y = x.new_empty(len(x), linear.outputs)
    given = _address(x, torch.float32), len(x), _address(y, torch.float32)
    if x.shape[1] != linear.inputs:
        raise ValueError(f"rows of {x.shape[1]} for a linear of {linear.inputs}")
    native.library.shoal_norm_linear(_norm(weight, x.shape[1]), eps, _linear(linear), *given)
    return y


def _declare(library: ctypes.CDLL) -> None:
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments


def _raise(error: int) -> None:
    if error == 3:
        raise MemoryError(ERRORS[error])
    if error:
        raise ValueError(ERRORS[error])


def _layer(part: Part, pools: Pools | None) -> _Layer:
    made = _Layer()
    attention = part.attention if isinstance(part, DenseLayer) else part
    feed_forward = part.feed_forward if isinstance(part, DenseLayer) else part
    made.hidden = _hidden(part)
    if isinstance(attention, AttentionPart):
        if pools is None:
            raise ValueError("a layer that attends needs pools")
        _set_attention(made, attention, pools)
    if isinstance(feed_forward, FeedForward):
        _set_feed_forward(made, feed_forward)
    return made


def _hidden(part: Part) -> int:
    first = part.attention if isinstance(part, DenseLayer) else part
    return len(first.norm)


def _set_attention(made: _Layer, part: AttentionPart, pools: Pools) -> None:
    made.qkv, made.out = _linear(part.qkv), _linear(part.out)
    made.attention_norm = _norm(part.norm, made.hidden)
    made.attention_after = _norm(part.after, made.hidden)
    made.query_norm, made.key_norm = _norm(part.query_norm), _norm(part.key_norm)
    made.query_norm_length = 0 if part.query_norm is None else len(part.query_norm)
    made.key_norm_length = 0 if part.key_norm is None else len(part.key_norm)
    made.heads, made.angles, made.attention_eps = part.heads, part.rotary, part.eps
    made.scores, made.cache = _scores(part.scores), _cache(pools)
    if (part.kv_heads, part.width) != pools.keys.shape[1:]:
        raise ValueError(f"pools of {tuple(pools.keys.shape)} for {part.kv_heads} x {part.width}")
    if part.scores.sinks is not None and len(part.scores.sinks) != part.heads:
        raise ValueError(f"{len(part.scores.sinks)} sinks for {part.heads} heads")


def _set_feed_forward(made: _Layer, part: FeedForward) -> None:
    made.gate_up, made.down = _linear(part.gate_up), _linear(part.down)
    made.mlp_norm = _norm(part.norm, made.hidden)
    made.mlp_after = _norm(part.after, made.hidden)
    made.activation, made.mlp_eps = ACTIVATIONS[part.activation], part.eps


def _scores(how: Scores) -> _Scores:
    sinks = None if how.sinks is None else _address(how.sinks, torch.float32)
    return _Scores(how.scaling, how.softcap or 0.0, how.window or 0, sinks)


def _cache(pools: Pools) -> _Cache:
    slots, kv_heads, width = pools.keys.shape
    scales = pools.key_scale.shape, pools.value_scale.shape
    if pools.values.shape[:2] != (slots, kv_heads) or set(scales) != {(slots, kv_heads)}:
        raise ValueError("the four pools differ in slots or heads")
    sizes = slots, kv_heads, width, pools.values.shape[2]
    keys = _address(pools.keys, torch.int16), _address(pools.key_scale, torch.float32)
    values = _address(pools.values, torch.int16), _address(pools.value_scale, torch.float32)
    return _Cache(*sizes, *keys, *values)


def _table(angles: Angles, tokens: int) -> _Angles:
    if angles.cos.shape != angles.sin.shape or len(angles.cos) != tokens:
        raise ValueError(f"angles of {tuple(angles.cos.shape)} for {tokens} tokens")
    half = angles.cos.shape[1]
    return _Angles(half, _address(angles.cos, torch.float32), _address(angles.sin, torch.float32))


def _linear(linear: Linear) -> int | None:
    if linear.compiled is None:
        raise ValueError("a linear that is not compiled cannot be part of a compiled layer")
    return linear.compiled.handle


def _norm(weight: Tensor | None, length: int | None = None) -> int | None:
    if weight is None:
        return None
    if length is not None and weight.shape != (length,):
        raise ValueError(f"a norm of {tuple(weight.shape)} for rows of {length}")
    return _address(weight, torch.float32)


def _address(tensor: Tensor, dtype: torch.dtype) -> int:
    if tensor.dtype is not dtype or not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(f"wants a contiguous {dtype} tensor on the CPU, got {tensor.dtype}")
    return tensor.data_ptr()
