"""Layer by layer: what has come, what has not, and what becomes of what came."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.models.checkpoint import open_checkpoint
from shoal.models.loading import load_weights
from shoal.models.skeleton import PassThrough, build
from shoal.units import Slice

FolderOf = Callable[[str], Path]


def hollow(module: torch.nn.Module) -> bool:
    return any(parameter.is_meta for parameter in module.parameters())


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3"])
def test_each_part_is_handed_over_before_the_next_is_read(folder_of: FolderOf, family: str) -> None:
    checkpoint, layers = open_checkpoint(str(folder_of(family))), Slice(1, 4)
    model = build(checkpoint.architecture, layers, torch.float32)
    seen: list[int | None] = []

    def ready(part: Any, index: int | None) -> None:
        seen.append(index)
        own = list(model.base_model.layers)
        if index is None:
            assert part is model
            assert not hollow(model.lm_head)
            assert all(hollow(own[each]) for each in layers)
            return
        assert part is own[index]
        assert not hollow(part)
        assert all(hollow(own[later]) for later in range(index + 1, layers.stop))

    load_weights(model, checkpoint, layers, torch.float32, "cpu", ready=ready)
    assert seen == [None, 1, 2, 3]
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_layer_may_be_replaced_as_soon_as_it_is_there(folder_of: FolderOf) -> None:
    """Then nothing of it stays in memory, and the later ones are checked all the same."""
    checkpoint = open_checkpoint(str(folder_of("llama")))
    model = build(checkpoint.architecture, checkpoint.whole, torch.float32)

    def ready(part: Any, index: int | None) -> None:
        if index is not None:
            model.base_model.layers[index] = PassThrough(part)

    load_weights(model, checkpoint, checkpoint.whole, torch.float32, "cpu", ready=ready)
    left = {name for name, _ in model.named_parameters()}
    assert left == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
