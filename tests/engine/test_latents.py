"""Attention over latents in the float classes: what is cached, and what is computed of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from shoal.engine import attention
from shoal.engine.attention import attend_latents
from shoal.engine.kv import kv_layout
from shoal.models.checkpoint import Checkpoint
from shoal.models.slice import load_slice
from shoal.units import Quant

Tiny = Callable[[str], tuple[Checkpoint, Any]]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("most", [1 << 24, 90])  # scores at a time: all, those of two tokens
@pytest.mark.parametrize("count", [1, 5])
def test_it_is_attention_with_both_parts_as_keys_and_latents_as_values(
    count: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "MOST_SCORES", most)
    q, latents, turned = noise(count, 4, 24), noise(11, 16, seed=1), noise(11, 8, seed=2)
    mask = torch.ones(count, 11, dtype=torch.bool).tril(11 - count)
    scores = torch.einsum("nhd,sd->nhs", q, torch.cat((latents, turned), 1)) * 0.3
    weights = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
    out = attend_latents(q, latents, turned, None if count == 1 else mask, 0.3)
    assert torch.allclose(out, torch.einsum("nhs,sr->nhr", weights, latents), atol=1e-5)


@pytest.mark.parametrize("quant", ["none", "int8"])
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_a_token_is_cached_as_one_latent_and_one_rotated_key(
    tiny: Tiny, family: str, quant: Quant
) -> None:
    checkpoint, _ = tiny(family)
    layout = kv_layout(load_slice(checkpoint, checkpoint.whole, quant=quant))
    for layer in layout.values():
        assert (layer.keys, layer.values) == ((1, 16), (1, 16))
        assert layer.direct  # attended to as it lies there: nothing of the past is expanded
