"""Fused layers against transformers' own forward, family by family."""

from pathlib import Path

import pytest
import torch

from shoal.engine.schedule import make_prompts, make_stages, plain_logits, run_schedule
from shoal.exact import native
from shoal.models import dense, quant
from shoal.models.checkpoint import open_checkpoint
from shoal.models.random_checkpoint import write_random_checkpoint

from .families import DENSE


class FloatLinear:
    """Stands in for an exact linear: what is wrong then is the layer, not the rounding."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight, self.bias = weight.detach(), bias
        self.compiled, self.product, self.nbytes = None, None, 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("family", DENSE)
def test_a_family_is_read_as_what_its_own_forward_computes(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = write_random_checkpoint(DENSE[family], tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    prompts = make_prompts(checkpoint.vocab_size)
    plain = [plain_logits(reference, prompt) for prompt in prompts]
    monkeypatch.setattr(native, "load", lambda: None)
    for module in (dense, quant):
        monkeypatch.setattr(module, "quantise", lambda kind: FloatLinear)
    stages = make_stages(checkpoint, (), "int8")
    assert stages[0].model.dense is not None
    for answer in run_schedule(stages, prompts):
        expected = plain[answer.session][answer.position]
        error = (answer.logits - expected).abs().max() / expected.abs().max()
        assert error < 5e-3, (answer.session, answer.position)  # 12-bit keys and values
