# ruff: noqa: N803 - the letters at the end of a tensor's name are its axes

from typing import Any

import pytest
import torch
from torch import nn

from shoal.errors import UnsupportedModel
from shoal.models.absorbed import ExactHeads, FloatHeads, absorb
from shoal.models.skeleton import causal_class, read_config

from .families import MIXTURES

LATENT = ("deepseek_v2", "deepseek_v3")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention_of(family: str) -> Any:
    config = read_config(MIXTURES[family])
    model = causal_class(config)._from_config(config, dtype=torch.float32)
    attention = model.base_model.layers[0].self_attn
    attention.kv_b_proj.weight.data = noise(*attention.kv_b_proj.weight.shape) * 0.3
    return attention


class Uncached:
    """Attention of all tokens over all latents, after the textbook; notes what it is given."""

    def attend_latents(
        self, q_1HTD: torch.Tensor, latents: torch.Tensor, turned: torch.Tensor, *, scaling: float
    ) -> torch.Tensor:
        self.widths = latents.shape[-1], turned.shape[-1]
        keys = torch.cat((latents, turned), -1)
        weights = (q_1HTD @ keys.transpose(2, 3) * scaling).softmax(-1)
        return (weights @ latents).transpose(1, 2)


def expanded(attention: Any, q: torch.Tensor, latents: torch.Tensor, turned: torch.Tensor) -> Any:
    keys, values = attention.expand_kv(latents, turned)
    weights = (q @ keys.transpose(2, 3) * 0.2).softmax(-1)
    return (weights @ values).transpose(1, 2)


@pytest.mark.parametrize(("exact", "tolerance"), [(False, 1e-5), (True, 0.03)])
@pytest.mark.parametrize("family", LATENT)
@torch.no_grad()
def test_absorbed_attention_is_that_of_expanded_latents(
    family: str, exact: bool, tolerance: float
) -> None:
    attention, cache = attention_of(family), Uncached()
    q = noise(1, 4, 5, 32, seed=1)
    latents, turned = noise(1, 1, 9, 16, seed=2), noise(1, 1, 9, 16, seed=3)
    expected = expanded(attention, q, latents, turned)
    assert absorb(attention, exact=exact) == 1
    assert not hasattr(attention, "kv_b_proj")
    cached = attention.expand_kv(latents, turned)
    assert cached[0] is latents
    out = attention.absorbed.attend(cache, q, *cached, 0.2)
    assert cache.widths == (16, 16)
    assert out.shape == expected.shape
    assert (out - expected).norm() < tolerance * expected.norm()


def test_a_head_of_the_exact_class_gives_a_token_its_bits_alone() -> None:
    heads, x = ExactHeads(noise(3, 20, 12)), noise(3, 7, 12, seed=1)
    y = heads(x)
    assert (y - FloatHeads(noise(3, 20, 12))(x)).norm() < 0.03 * y.norm()
    assert all(torch.equal(heads(x[:, at : at + 1])[:, 0], y[:, at]) for at in range(7))


def test_expansion_of_another_kind_stays_as_it_is_and_is_not_exact() -> None:
    class Odd(nn.Module):
        num_heads, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim = 2, 4, 4, 4, 4

        def __init__(self) -> None:
            super().__init__()
            self.kv_b_proj = nn.Linear(4, 16, bias=False)

        def expand_kv(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            keys, values = self.kv_b_proj(a).view(1, -1, 2, 8).transpose(1, 2).split(4, -1)
            return torch.cat((keys, b.expand_as(keys)), -1), values * 2

    odd = Odd()
    absorb(odd, exact=False)
    assert type(odd.kv_b_proj) is nn.Linear
    with pytest.raises(UnsupportedModel, match="Odd"):
        absorb(odd, exact=True)
