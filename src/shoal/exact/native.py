"""Calls the compiled library, where there is one. `load` gives None elsewhere and never raises.

Looked for beside this file first, then in the user's cache, where it is compiled once if a C++
compiler is there. SHOAL_KERNELS=off does without; SHOAL_ISA=generic (or avx2, ...) picks a variant.
"""

# M rows · K inputs · N outputs · all tensors contiguous, on the CPU

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Sequence
from ctypes import c_char_p, c_int, c_int64, c_void_p
from itertools import pairwise
from pathlib import Path
from typing import Any

import platformdirs
import torch
from torch import Tensor

from . import build

LARGEST_K = 131_000
BESIDE = Path(__file__).parent / build.library_name()
log = logging.getLogger(__name__)


@functools.cache
def load() -> Native | None:
    """The library, found or compiled (seconds, once a machine); None where there is none."""
    if os.environ.get("SHOAL_KERNELS", "").lower() in ("off", "0", "no"):
        return None
    return opened(BESIDE) or opened(_in_cache())


def _in_cache() -> Path:
    """The library in the user's cache, compiled now if need be. A failure is remembered there."""
    folder = platformdirs.user_cache_path("shoal") / "kernels" / build.cache_name()
    library, failure = folder / build.library_name(), folder / "failed"
    try:
        if not library.exists() and not failure.exists():
            log.info("compiling the kernels, once on this machine")
            build.build(library)
    except build.BuildError as error:
        log.warning("computing without compiled kernels, several times slower: %s", error)
        _remember(failure, str(error))
    except OSError as error:
        log.warning("computing without compiled kernels, several times slower: %s", error)
    return library


def _remember(failure: Path, reason: str) -> None:
    try:
        failure.parent.mkdir(parents=True, exist_ok=True)
        failure.write_text(reason)
    except OSError:
        log.debug("cannot write %s", failure)


def opened(path: Path) -> Native | None:
    """The library in this file; None where there is none that fits."""
    if not path.exists():
        return None
    try:
        library = ctypes.CDLL(str(path))
        library.shoal_fingerprint.restype = c_char_p
        if library.shoal_fingerprint().decode() == build.fingerprint():
            return Native(library)
        log.info("%s was made from other sources", path)
    except (OSError, AttributeError) as error:
        log.warning("cannot use %s: %s", path, error)
    return None


class Native:
    """The library's functions. Threads are shared by all its linears; calls may come from any."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self.run = library.shoal_linear_run
        self.run_rows = library.shoal_linear_run_rows
        self.free = library.shoal_linear_free
        library.shoal_set_threads(torch.get_num_threads())

    @property
    def isa(self) -> str:
        """The variant in use, e.g. "avx512vnni"."""
        return str(self.library.shoal_isa().decode())

    def set_isa(self, name: str) -> bool:
        """Use this variant from now on; False where it cannot run here."""
        return bool(self.library.shoal_set_isa(name.encode()))

    @property
    def threads(self) -> int:
        return int(self.library.shoal_threads())

    def set_threads(self, count: int) -> None:
        """How many threads compute, the caller's included. Results do not depend on it."""
        self.library.shoal_set_threads(count)

    def linear8(self, weights: Tensor, scale: Tensor, bias: Tensor | None = None) -> NativeLinear:
        """weights (N, K) int8, scale (N,) float32, bias (N,) float32. Copies them."""
        n, k = weights.shape
        args = _pointer(weights, torch.int8), *_scales(n, scale, bias)
        return NativeLinear(self, self.library.shoal_linear8(*args, n, k), weights.shape, 8)

    def linear4(
        self,
        codes: Tensor,
        table: Tensor,
        multipliers: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
    ) -> NativeLinear:
        """codes (N, K) uint8 below 16, table (16,) int8, multipliers (N, ceil(K / 32)) uint8.

        Weight n, k is table[codes[n, k]] * multipliers[n, k // 32], within -127..127.
        """
        n, k = codes.shape
        _require(table.shape == (16,) and multipliers.shape == (n, -(-k // 32)), "shapes")
        arrays = _pointer(codes, torch.uint8), _pointer(table, torch.int8)
        args = *arrays, _pointer(multipliers, torch.uint8), *_scales(n, scale, bias)
        return NativeLinear(self, self.library.shoal_linear4(*args, n, k), codes.shape, 4)

    def linear16(self, weights: Tensor, bias: Tensor | None = None) -> NativeLinear:
        """weights (N, K) float32, rounded to 12 bits per row here."""
        n, k = weights.shape
        args = _pointer(weights, torch.float32), _bias(bias)
        made = self.library.shoal_linear16(*args, n, k)
        return NativeLinear(self, made, weights.shape, 16)

    def round4(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """weight (N, K) float32 -> codes, multipliers and scale of `linear4`, as quantise_int4."""
        n, k = weight.shape
        codes = torch.empty(n, k, dtype=torch.uint8)
        multipliers = torch.empty(n, -(-k // 32), dtype=torch.uint8)
        scale = torch.empty(n)
        into = codes.data_ptr(), multipliers.data_ptr(), scale.data_ptr()
        self.library.shoal_round4(_pointer(weight, torch.float32), n, k, *into)
        return codes, multipliers, scale

    def quantise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (M, K) float32 -> codes (M, K) uint8, scale (M, 1), as `quantise_rows` does."""
        codes, scale = torch.empty(x.shape, dtype=torch.uint8), x.new_empty(len(x), 1)
        into = codes.data_ptr(), scale.data_ptr()
        self.library.shoal_quantise(_pointer(x, torch.float32), *x.shape, *into)
        return codes, scale


class NativeLinear:
    """One packed linear: (M, K) float32 -> (M, N) float32. Frees its memory with itself.

    A row with a NaN or an infinity comes out as all NaN; no other row changes.
    Raises ValueError where weights are out of range or K is over 131000.
    """

    __slots__ = ("_run", "handle", "inputs", "kind", "native", "outputs")

    def __init__(self, native: Native, handle: int | None, shape: torch.Size, kind: int) -> None:
        self.native, self._run, self.handle = native, native.run, handle
        self.outputs, self.inputs = shape
        self.kind = kind
        if not handle:
            raise ValueError(f"cannot pack {tuple(shape)} weights: a value or size is out of range")

    def __call__(self, x: Tensor) -> Tensor:
        rows, inputs = x.shape
        if inputs != self.inputs or x.dtype is not torch.float32 or not x.is_contiguous():
            raise ValueError(
                f"wanted contiguous float32 (M, {self.inputs}), got {x.dtype} {x.shape}"
            )
        y = torch.empty(rows, self.outputs)
        self._run(self.handle, x.data_ptr(), rows, y.data_ptr())
        return y

    @property
    def nbytes(self) -> int:
        """What the packed weights take."""
        return int(self.native.library.shoal_linear_bytes(self.handle))

    def __del__(self) -> None:
        if self.handle:
            self.native.free(self.handle)


class NativeExperts:
    """Several linears of one shape, each for its own rows of x, in one parallel region."""

    def __init__(self, experts: Sequence[NativeLinear]) -> None:
        shapes = {(expert.outputs, expert.inputs, expert.kind) for expert in experts}
        _require(len(shapes) == 1, "experts differ in shape or kind")
        self._experts, self._run = list(experts), experts[0].native.run_rows
        self._handles = (c_void_p * len(experts))(*[expert.handle for expert in experts])
        self._inputs, self.outputs = experts[0].inputs, experts[0].outputs

    def __call__(self, x: Tensor, row_begin: Sequence[int]) -> Tensor:
        """Rows row_begin[e] .. row_begin[e + 1] of x (M, K) go through expert e -> (M, N).

        row_begin has one entry more than there are experts, from 0 up to M, never falling.
        """
        rows, count = x.shape[0], len(self._experts)
        _require(x.shape[1] == self._inputs and len(row_begin) == count + 1, "shapes")
        _require(row_begin[0] == 0 and row_begin[-1] == rows, "rows without an expert")
        _require(all(a <= b for a, b in pairwise(row_begin)), "row_begin falls")
        y = torch.empty(rows, self.outputs)
        begins = (c_int * (count + 1))(*row_begin)
        self._run(self._handles, count, begins, _pointer(x, torch.float32), y.data_ptr())
        return y


Pointer = c_void_p
SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "shoal_fingerprint": (c_char_p, []),
    "shoal_isa": (c_char_p, []),
    "shoal_set_isa": (c_int, [c_char_p]),
    "shoal_set_threads": (None, [c_int]),
    "shoal_threads": (c_int, []),
    "shoal_set_spin_us": (None, [c_int]),
    "shoal_linear8": (Pointer, [Pointer, Pointer, Pointer, c_int, c_int]),
    "shoal_linear4": (Pointer, [Pointer, Pointer, Pointer, Pointer, Pointer, c_int, c_int]),
    "shoal_linear16": (Pointer, [Pointer, Pointer, c_int, c_int]),
    "shoal_linear_free": (None, [Pointer]),
    "shoal_linear_bytes": (c_int64, [Pointer]),
    "shoal_round4": (None, [Pointer, c_int, c_int, Pointer, Pointer, Pointer]),
    "shoal_quantise": (None, [Pointer, c_int, c_int, Pointer, Pointer]),
    "shoal_linear_run": (None, [Pointer, Pointer, c_int, Pointer]),
    "shoal_linear_run_rows": (None, [Pointer, c_int, Pointer, Pointer, Pointer]),
}


def _pointer(tensor: Tensor, dtype: torch.dtype) -> int:
    _require(tensor.dtype is dtype and tensor.device.type == "cpu", f"not {dtype} on the CPU")
    _require(tensor.is_contiguous(), "not contiguous")
    return tensor.data_ptr()


def _scales(outputs: int, scale: Tensor, bias: Tensor | None) -> tuple[int, int | None]:
    _require(scale.shape == (outputs,), "scale shape")
    _require(bias is None or bias.shape == (outputs,), "bias shape")
    return _pointer(scale, torch.float32), _bias(bias)


def _bias(bias: Tensor | None) -> int | None:
    return None if bias is None else _pointer(bias, torch.float32)


def _require(holds: bool, what: str) -> None:
    """What the library would read or write out of bounds without: asserts may be switched off."""
    if not holds:
        raise ValueError(f"cannot compute: {what}")
