"""What scripts/gpu_check.py asks of a GPU, asked of the CPU; and of a GPU, where there is one. CI
has none: there these tests show that the questions can be asked, and no more.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from shoal.models.checkpoint import BUILTIN, Checkpoint, open_checkpoint

Tiny = Callable[[str], tuple[Checkpoint, Any]]
SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_check.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["cpu", "cuda:0"])
def device(request: pytest.FixtureRequest) -> str:
    if request.param != "cpu" and not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA GPU; on one that has: python scripts/gpu_check.py")
    return str(request.param)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_device_gives_the_bits_of_the_cpu(
    script: ModuleType, tiny: Tiny, family: str, device: str
) -> None:
    found = dict(script.compared(tiny(family)[0], device))
    assert len(found) == 6
    assert all(found.values()), found


def test_it_is_measured_in_every_kind_of_weights(script: ModuleType, device: str) -> None:
    checkpoint = open_checkpoint(BUILTIN)
    script.BATCHES, script.CONTEXT, script.PROMPT, script.STEPS = (1, 2), 16, 32, 4
    for quant in ("none", "w8", "w4", "int8"):
        line = script.measured(checkpoint, device, quant, recorded=True)
        assert line.count("|") == 8
        assert "2 shapes" in line


def test_a_difference_is_seen(script: ModuleType) -> None:
    one = torch.tensor([1.0, -4.0])
    assert script.difference(one, one) == 0.0
    assert script.difference(one + torch.tensor([0.0, 0.5]), one) == 0.125
    assert script.verdict(False) == "DIFFERENT"
