"""Slices that are to be computed on another device than the CPU."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from shoal.errors import NoCapacity, UnsupportedModel
from shoal.models import slice as slices
from shoal.models.checkpoint import BUILTIN, open_checkpoint
from shoal.pipeline import ServingConfig
from shoal.pipeline.loading import load_stage

TINY = open_checkpoint(BUILTIN)
CONFIG = ServingConfig(memory_bytes=1 << 28, kv_tokens=64, device="cuda:0")


def test_a_full_gpu_is_told_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(slices, "load_slice", full)
    with pytest.raises(NoCapacity, match="do not fit into cuda:0") as caught:
        load_stage(TINY, TINY.whole, CONFIG)
    assert "--layers" in caught.value.hint


def test_a_device_with_other_bits_serves_no_exact_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "computes_exactly", lambda device: device == "cpu")
    with pytest.raises(UnsupportedModel, match="does not give the bits") as caught:
        load_stage(TINY, TINY.whole, replace(CONFIG, quant="int8"))
    assert "--quant none" in caught.value.hint
    load_stage(TINY, TINY.whole, replace(CONFIG, quant="int8", device="cpu"))
