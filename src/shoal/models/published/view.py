"""A checkpoint's tensors under the names that the architecture knows, read when asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import EllipsisType

from torch import Tensor

from ...errors import UnsupportedModel
from ..safetensors_read import read_tensor
from .integers import Grouped
from .layout import MAIN, Plain
from .mxfp4 import Fp4


class PlainTensors:
    """The tensors `plain` (see `plain_tensors`) of the files in `folder`."""

    def __init__(self, folder: Path, plain: Mapping[str, Plain]) -> None:
        self._folder, self._plain = folder, plain

    def lazy(self, name: str) -> Lazy:
        return Lazy(self, name)

    def floats(self, name: str) -> Tensor:
        """The tensor, dequantised when it is stored so. Raises UnsupportedModel."""
        plain = self._plain[name]
        stored = self._read(plain)
        if plain.layout is None:
            return stored[MAIN]
        try:
            return plain.layout.floats(stored)
        except UnsupportedModel as why:
            raise UnsupportedModel(f"{name} cannot be read: {why}", hint=why.hint) from None

    def int4(self, name: str) -> Grouped | None:
        """codes (N, K) int8, scales (N, K / group) float32, zero points; None when `name` is not
        stored in 4-bit integers, or its groups are no runs of columns (GPTQ's desc_act).
        """
        plain = self._plain[name]
        return None if plain.layout is None else plain.layout.int4(self._read(plain))

    def fp4(self, name: str) -> Fp4 | None:
        """codes (..., N, K) uint8 and exponents (..., N, K / 32); None when not stored so."""
        plain = self._plain[name]
        return None if plain.layout is None else plain.layout.fp4(self._read(plain))

    def _read(self, plain: Plain) -> dict[str, Tensor]:
        return {role: read_tensor(self._folder, x.info) for role, x in plain.parts.items()}


class Lazy:
    """Looks to transformers like a slice of a safetensors file: `[...]` reads."""

    def __init__(self, tensors: PlainTensors, name: str) -> None:
        self._tensors, self._name = tensors, name

    def __getitem__(self, index: EllipsisType) -> Tensor:
        return self._tensors.floats(self._name)
