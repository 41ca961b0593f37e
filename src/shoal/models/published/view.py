"""A slice's tensors under the names that the architecture knows, read when they are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import safetensors
from torch import Tensor

from .integers import Grouped
from .layout import MAIN, Part, Plain
from .mxfp4 import Fp4


class PlainTensors:
    """Opens the files of some tensors; `plain` comes from `plain_tensors`."""

    def __init__(self, folder: Path, plain: Mapping[str, Plain]) -> None:
        self._folder, self._plain = folder, plain
        self._files: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        for file in sorted({p.info.file for x in self._plain.values() for p in x.parts.values()}):
            opened = safetensors.safe_open(self._folder / file, "pt")
            self._files[file] = self._stack.enter_context(opened)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def lazy(self, name: str) -> Any:
        """What `[...]` turns into the tensor; until then nothing of it is read."""
        plain = self._plain[name]
        return self._slice(plain.parts[MAIN]) if plain.layout is None else Packed(self, name)

    def floats(self, name: str) -> Tensor:
        plain = self._plain[name]
        if plain.layout is None:
            tensor: Tensor = self.lazy(name)[...]
            return tensor
        return plain.layout.floats(self._stored(plain))

    def int4(self, name: str) -> Grouped | None:
        """codes (N, K) int8, scales (N, K / group) float32, zero points; None when `name` is not
        stored in 4-bit integers, or its groups are no runs of columns (GPTQ's desc_act).
        """
        plain = self._plain[name]
        return plain.layout.int4(self._stored(plain)) if plain.layout is not None else None

    def fp4(self, name: str) -> Fp4 | None:
        """codes (..., N, K) uint8 and exponents (..., N, K / 32); None when not stored so."""
        plain = self._plain[name]
        return plain.layout.fp4(self._stored(plain)) if plain.layout is not None else None

    def _stored(self, plain: Plain) -> dict[str, Tensor]:
        return {role: self._slice(part)[...] for role, part in plain.parts.items()}

    def _slice(self, part: Part) -> Any:
        return self._files[part.info.file].get_slice(part.name)


class Packed:
    """Looks to transformers like a slice of a safetensors file."""

    def __init__(self, tensors: PlainTensors, name: str) -> None:
        self._tensors, self._name = tensors, name

    def __getitem__(self, index: Any) -> Tensor:
        return self._tensors.floats(self._name)[index]
