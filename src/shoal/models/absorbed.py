"""Attention over latents (MLA) without expanding them: keys and values of all heads are never made.

A token's keys and values of all heads are one matrix times its latent. Products with keys are
products of a query, taken through the matrix's key part, with latents; the sum of values is the sum
of latents, taken through its value part. So a cached token costs each head a product with the
latent alone, and nothing of the past is computed again.

T tokens · H heads · N width of a head's key before its rotated part · R of latents · P of rotated
keys · D = R + P · V of a head's values
"""

# ruff: noqa: N803, N806 - the letters at the end of a tensor's name are its axes

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModel
from ..exact.experts import Grouped
from ..exact.linear import Linear
from ..exact.weights import quantise_int8

if TYPE_CHECKING:
    from .attention import Ragged

PerHead = Callable[[Tensor], Tensor]  # (H, T, inputs) -> (H, T, outputs)
SIZES = ("num_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
TOLERANCE = 1e-4


class Absorbed(nn.Module):
    """What stands between a model's own attention over latents and the cache."""

    def __init__(self, queries: PerHead, values: PerHead, key_width: int) -> None:
        super().__init__()
        self._queries, self._values, self._key_width = queries, values, key_width

    def attend(
        self, ragged: Ragged, q_1HTD: Tensor, latents: Tensor, turned: Tensor, scaling: float
    ) -> Tensor:
        """Returns (1, T, H, V). `latents` and `turned` are what the cache's `update` returned."""
        plain, rotated = q_1HTD[..., : self._key_width], q_1HTD[..., self._key_width :]
        q = torch.cat((self._queries(plain[0]), rotated[0]), -1)[None]
        out_THR = ragged.attend_latents(q, latents, turned, scaling=scaling)[0]
        return self._values(out_THR.transpose(0, 1)).transpose(0, 1)[None]

    @property
    def kept_bytes(self) -> int:
        return sum(getattr(part, "nbytes", 0) for part in (self._queries, self._values))


class FloatHeads(nn.Module):
    """weight (H, outputs, inputs), in the type it has."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)

    def forward(self, x_HTK: Tensor) -> Tensor:
        return torch.matmul(x_HTK, self.weight.transpose(1, 2))


class ExactHeads:
    """The same in the exact class, 8 bits a weight."""

    def __init__(self, weight: Tensor) -> None:
        self._grouped = Grouped([Linear(quantise_int8(head.contiguous())) for head in weight])
        self.nbytes = self._grouped.nbytes

    def __call__(self, x_HTK: Tensor) -> Tensor:
        heads, tokens, width = x_HTK.shape
        bounds = torch.arange(0, heads * tokens + 1, tokens, dtype=torch.int32)
        y = self._grouped(x_HTK.reshape(-1, width).float(), bounds)
        return y.view(heads, tokens, -1).to(x_HTK.dtype)


def absorb(part: nn.Module, *, exact: bool) -> int:
    """Let the attention over latents below `part` work without expanding them, in place; returns
    how many there were. Left as it is where it is not understood.

    Raises UnsupportedModel for such a one in the exact class.
    """
    found = list(_latent_attentions(part))
    for attention in found:
        if _understood(attention):
            _absorb(attention, ExactHeads if exact else FloatHeads)
        elif exact:
            raise UnsupportedModel(
                f"{type(attention).__name__} cannot be made exact: it expands latents in a way "
                "that is not known",
                hint="a float type works: --quant none",
            )
    return len(found)


def _latent_attentions(part: nn.Module) -> Iterator[Any]:
    for module in list(part.modules()):
        if hasattr(module, "expand_kv") and type(getattr(module, "kv_b_proj", None)) is nn.Linear:
            yield module


@torch.no_grad()
def _understood(attention: Any) -> bool:
    """Whether its own code makes keys and values as we take them to be made."""
    sizes = all(isinstance(getattr(attention, name, None), int) for name in SIZES)
    if not sizes or len(inspect.signature(attention.expand_kv).parameters) != 2:
        return False
    weight = attention.kv_b_proj.weight
    chance = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 1, 3, attention.kv_lora_rank, generator=chance).to(weight)
    turned = torch.randn(1, 1, 3, attention.qk_rope_head_dim, generator=chance).to(weight)
    key_part, value_part = _parts(attention)
    plain, rotated = (latents @ key_part.transpose(1, 2))[0], turned[0].expand(len(key_part), 3, -1)
    expected = torch.cat((plain, rotated), -1), (latents @ value_part.transpose(1, 2))[0]
    return attention.kv_b_proj.bias is None and all(
        one[0].shape == other.shape and (one[0] - other).norm() <= _tolerance(weight) * other.norm()
        for one, other in zip(attention.expand_kv(latents, turned), expected, strict=True)
    )


def _tolerance(weight: Tensor) -> float:
    return max(TOLERANCE, torch.finfo(weight.dtype).eps * 2)


def _parts(attention: Any) -> tuple[Tensor, Tensor]:
    """The key part (H, N, R) and the value part (H, V, R) of the matrix that expands latents."""
    weight = attention.kv_b_proj.weight.detach()
    both = weight.view(attention.num_heads, -1, attention.kv_lora_rank)
    key_part, value_part = both.split((attention.qk_nope_head_dim, attention.v_head_dim), 1)
    return key_part, value_part


def _absorb(attention: Any, heads: Callable[[Tensor], PerHead]) -> None:
    key_part, value_part = _parts(attention)
    attention.absorbed = Absorbed(
        heads(key_part.transpose(1, 2)), heads(value_part), attention.qk_nope_head_dim
    )
    attention.expand_kv = _as_cached
    del attention.kv_b_proj


def _as_cached(latents: Tensor, turned: Tensor) -> tuple[Tensor, Tensor]:
    """In the place of `expand_kv`: what was cached goes on to the attention function."""
    return latents, turned
