"""Reads a model's own decoder layers as layers of the exact class, which run in few operations.

Only families whose layers are known to be nothing else than `exact/layer.py` are read so; each is
compared with transformers' own forward by tests/models/test_dense.py. All others run through their
own modules, with exact parts in them (`parts.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..exact import native, native_layer
from ..exact.attention import Scores
from ..exact.layer import Activation, Angles, AttentionPart, DenseLayer, FeedForward
from ..exact.linear import Linear
from ..exact.numbers import divided, rms_norm, tanh
from ..units import Quant, Slice
from .attention import Ragged
from .pieces import PreciseAngles
from .quant import Quantise, quantise
from .skeleton import PassThrough

FAMILIES = frozenset("llama mistral qwen2 qwen3 phi3 gemma2 glm4".split())  # noqa: SIM905
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
}
NEIGHBOURS_TURN = {"glm4"}  # rotates entries 2i and 2i + 1 instead of i and i + R/2
NORMS_ADD_ONE = {"gemma2"}
FIRST_ANGLES = 1024  # positions; the tables double when they are outgrown


def is_dense(config: Any) -> bool:
    """Whether all layers of this model can be read."""
    act = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    return config.model_type in FAMILIES and act in ACTIVATIONS


def read_layer(layer: nn.Module, config: Any, rotated: int, quantise: Quantise) -> DenseLayer:
    """The layer's weights, rounded. `rotated` is how many entries of a head are rotated."""
    return DenseLayer(
        _attention(layer, config, rotated, quantise), _feed_forward(layer, config, quantise)
    )


def _attention(layer: Any, config: Any, rotated: int, quantise: Quantise) -> AttentionPart:
    attention = layer.self_attn
    heads = int(config.num_attention_heads)
    kv_heads = int(config.num_key_value_heads or heads)
    width = int(attention.head_dim)
    weight, bias = _joined(attention, ("qkv_proj",), ("q_proj", "k_proj", "v_proj"))
    if config.model_type in NEIGHBOURS_TURN:
        order = _halves(heads, kv_heads, width, rotated)
        weight, bias = weight[order], None if bias is None else bias[order]
    after = {"gemma2": "post_attention_layernorm", "glm4": "post_self_attn_layernorm"}
    return AttentionPart(
        norm=_norm(layer.input_layernorm, config),
        qkv=quantise(weight, bias),
        out=quantise(attention.o_proj.weight, attention.o_proj.bias),
        heads=heads,
        kv_heads=kv_heads,
        width=width,
        scores=_scores(attention, config),
        query_norm=_maybe_norm(attention, "q_norm", config),
        key_norm=_maybe_norm(attention, "k_norm", config),
        after=_maybe_norm(layer, after.get(config.model_type, ""), config),
        eps=float(config.rms_norm_eps),
    )


def _feed_forward(layer: Any, config: Any, quantise: Quantise) -> FeedForward:
    act = getattr(config, "hidden_act", None) or config.hidden_activation
    before = {"gemma2": "pre_feedforward_layernorm"}
    after = {"gemma2": "post_feedforward_layernorm", "glm4": "post_mlp_layernorm"}
    return FeedForward(
        norm=_norm(
            getattr(layer, before.get(config.model_type, "post_attention_layernorm")), config
        ),
        gate_up=quantise(*_joined(layer.mlp, ("gate_up_proj",), ("gate_proj", "up_proj"))),
        down=quantise(layer.mlp.down_proj.weight, layer.mlp.down_proj.bias),
        activation=ACTIVATIONS[act],
        after=_maybe_norm(layer, after.get(config.model_type, ""), config),
        eps=float(config.rms_norm_eps),
    )


def _joined(parent: Any, *names: tuple[str, ...]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the first of these groups of linears that `parent` has."""
    linears = next(
        [getattr(parent, n) for n in group] for group in names if hasattr(parent, group[0])
    )
    if len(linears) == 1:
        return linears[0].weight, linears[0].bias
    weight = torch.cat([each.weight for each in linears])
    biases = [each.bias for each in linears]
    return weight, None if biases[0] is None else torch.cat(biases)


def _halves(heads: int, kv_heads: int, width: int, rotated: int) -> Tensor:
    """The order of the joined product's rows in which rotated neighbours lie half a turn apart."""
    own = torch.arange(width)
    turned = torch.cat((own[:rotated:2], own[1:rotated:2], own[rotated:]))
    starts = torch.arange(heads + kv_heads)[:, None] * width
    values = torch.arange((heads + kv_heads) * width, (heads + 2 * kv_heads) * width)
    return torch.cat(((starts + turned).flatten(), values))


def _scores(attention: Any, config: Any) -> Scores:
    window = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
    return Scores(
        float(attention.scaling),
        window=int(window) if window else None,
        softcap=getattr(attention, "attn_logit_softcapping", None),
    )


def _norm(norm: Any, config: Any) -> Tensor:
    weight: Tensor = norm.weight.detach().float().clone()
    return weight.add_(1.0) if config.model_type in NORMS_ADD_ONE else weight


def _maybe_norm(parent: Any, name: str, config: Any) -> Tensor | None:
    norm = getattr(parent, name, None) if name else None
    return None if norm is None else _norm(norm, config)


# ---- in place of the model


class DenseParts:
    """The `Ready` of loading.py for a model whose layers are dense: reads each part as it comes,
    lets go of the model's own, and computes the slice in its place.
    """

    def __init__(self, model: Any, layers: Slice, context_length: int, kind: Quant) -> None:
        self._model, self._quantise = model, quantise(kind)
        self._angles = AngleTable(model.base_model.rotary_emb, context_length)
        self._layers: dict[int, DenseLayer] = {}
        self._embed: nn.Module | None = model.base_model.embed_tokens if not layers.start else None
        self._head: Head | None = None

    def __call__(self, part: nn.Module, index: int | None) -> None:
        base, config = self._model.base_model, self._model.config
        if index is not None:
            self._layers[index] = read_layer(part, config, self._angles.rotated, self._quantise)
            base.layers[index] = PassThrough(part)
        elif type(self._model.lm_head) is nn.Linear:
            linear = self._model.lm_head  # 8 bits whatever the kind, as its own copy if tied
            exact = quantise("int8")(linear.weight, linear.bias)
            cap = getattr(config, "final_logit_softcapping", None)
            self._head = Head(_norm(base.norm, config), float(config.rms_norm_eps), exact, cap)
            self._model.lm_head = nn.Identity()
            if self._embed is None:
                base.embed_tokens = nn.Identity()

    @property
    def nbytes(self) -> int:
        """Of what it keeps outside the model."""
        layers = self._layers.values()
        parts = [part for layer in layers for part in (layer.attention, layer.feed_forward)]
        head = self._head.linear.nbytes if self._head is not None else 0
        return head + sum(linear.nbytes for part in parts for linear in part.linears)

    def forward(
        self,
        x: Tensor,
        own: Slice,
        positions: Tensor,
        highest: int,
        ragged: Ragged,
        rows: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """As `ModelSlice.forward` with the layers of `own`; its logits are float32."""
        embedded = x if self._embed is None or own.start else self._embed(x)
        hidden = embedded.to(torch.float32, copy=True)  # computed in place
        hidden = ragged.dense(self._layers, own, hidden, self._angles(positions, highest), dtype)
        if self._head is None or rows is None:
            return hidden.to(dtype)
        return self._head(hidden.index_select(0, rows))


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """The last norm, the product with the vocabulary, and the limit of the logits."""

    norm: Tensor
    eps: float
    linear: Linear
    softcap: float | None

    def __call__(self, x: Tensor) -> Tensor:
        """(R, E) -> (R, V), float32."""
        library = native.load() if self.linear.compiled is not None else None
        if library is None:
            logits = self.linear(rms_norm(x, self.norm, self.eps))
        else:
            logits = native_layer.norm_linear(library, x, self.norm, self.eps, self.linear)
        if self.softcap is None:
            return logits
        return tanh(divided(logits, self.softcap)).mul_(self.softcap)


class AngleTable:
    """cos and sin of every position so far, made by the model's own rotary module.

    Never beyond the context's length, where some rotations choose other frequencies for all.
    """

    def __init__(self, rotary: nn.Module, context_length: int) -> None:
        self._rotary, self._context_length = rotary, context_length
        self._cos = self._sin = torch.empty(0, 0)
        self._outgrown: list[Tensor] = []  # on a GPU, where captured graphs may still read them

    @property
    def rotated(self) -> int:
        """How many entries of a head are rotated."""
        self._reach(1)
        return 2 * self._cos.shape[1]

    def __call__(self, positions: Tensor, highest: int) -> Angles:
        self._reach(highest + 1)
        if self._cos.device != positions.device:
            self._cos, self._sin = self._cos.to(positions.device), self._sin.to(positions.device)
        return Angles(self._cos.index_select(0, positions), self._sin.index_select(0, positions))

    def _reach(self, length: int) -> None:
        length = min(length, self._context_length)
        if length <= len(self._cos):
            return
        length = max(FIRST_ANGLES, 1 << (length - 1).bit_length())
        length = min(length, self._context_length)
        if self._cos.device.type != "cpu":
            self._outgrown += [self._cos, self._sin]
        self._rotary.to("cpu")  # wherever they go: a GPU's cosines are others
        with PreciseAngles(), torch.inference_mode():
            cos, sin = self._rotary(torch.empty(1, 1), torch.arange(length)[None])
        half = cos.shape[-1] // 2
        self._cos, self._sin = cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
