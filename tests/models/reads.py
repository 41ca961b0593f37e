"""Says which tensors are read of the files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from torch import Tensor

from shoal.models.published import view
from shoal.models.safetensors_header import TensorInfo

Place = tuple[str, int]  # file, offset


def places(tensors: Iterable[TensorInfo]) -> list[Place]:
    return sorted((info.file, info.offset) for info in tensors)


def record_reads(monkeypatch: pytest.MonkeyPatch) -> list[Place]:
    """Grows with each tensor that is read from now on."""
    asked: list[Place] = []
    real = view.read_tensor

    def recording(folder: Path, info: TensorInfo) -> Tensor:
        asked.append((info.file, info.offset))
        return real(folder, info)

    monkeypatch.setattr(view, "read_tensor", recording)
    return asked
