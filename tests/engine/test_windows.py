"""Pages that lie before every layer's window are given back, and nothing changes."""

from pathlib import Path

import pytest
import torch

from shoal.engine.rows import Row
from shoal.engine.schedule import make_prompts, make_stages
from shoal.models.checkpoint import open_checkpoint
from shoal.models.random_checkpoint import write_random_checkpoint
from shoal.units import Quant, SessionId
from tests.models.families import FAMILIES


@pytest.mark.parametrize("kind", ["none", "int8"])
def test_pages_before_the_window_are_not_looked_at(tmp_path: Path, kind: Quant) -> None:
    write_random_checkpoint(FAMILIES["mistral"], tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    (stage,) = make_stages(checkpoint, (), kind)
    assert stage.window == 16
    prompt, size = make_prompts(checkpoint.vocab_size)[-1], stage.config.page_size
    pages = list(range(3, 3 + -(-len(prompt) // size)))
    whole = [logits(stage, prompt, at, pages) for at in range(len(prompt))]
    for at in range(len(prompt)):
        gone = max(0, at - 16) // size
        left = [-1] * gone + pages[gone:]
        assert torch.equal(logits(stage, prompt, at, left), whole[at])


def logits(stage: object, prompt: list[int], at: int, pages: list[int]) -> torch.Tensor:
    row = Row(SessionId("one"), at, pages, 1, [prompt[at]])
    found: torch.Tensor = stage.logits([row], [0])  # type: ignore[attr-defined]
    return found


def test_a_slice_with_one_layer_that_sees_everything_keeps_everything(tmp_path: Path) -> None:
    write_random_checkpoint(FAMILIES["gemma2"], tmp_path)
    (stage,) = make_stages(open_checkpoint(str(tmp_path)), (), "int8")
    assert stage.window is None
