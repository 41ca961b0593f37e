"""What a model takes in memory, told by the headers of its files alone. No torch.

All such sums are made here: placement, `shoal show` and the node use the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from ..errors import InvalidRequest
from ..units import EXACT, Quant
from .safetensors_header import DTYPE_BYTES

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .published import Plain

FLOAT_BYTES = {"f32": 4, "bf16": 2, "f16": 2}
GROUP, GROUP_BYTES = 32, 17  # int4: 32 codes of half a byte and one for their common multiplier
SCALE_BYTES = 4  # for each row of a rounded matrix, and each head of a token in the cache
CONVOLUTION = "conv"  # layers that keep a running state begin with a short one
EXPERTS = ".experts."  # in the names of what a token is only sent to in part
CODE_BYTES = 2  # of the exact class's cache


def check_dtype(dtype: str) -> str:
    """Raises InvalidRequest when it is no float type."""
    if dtype not in FLOAT_BYTES:
        raise InvalidRequest(
            f"{dtype!r} is no type to compute in", hint=f"choose one of {', '.join(FLOAT_BYTES)}"
        )
    return dtype


@dataclass(frozen=True, slots=True)
class Counted:
    """Some tensors, summed up: all that their size depends on."""

    matrices: int = 0  # numbers in tensors of two axes and more
    rows: int = 0  # of these
    groups: int = 0  # of 32 columns in these rows
    vectors: int = 0  # numbers in all other tensors
    foreign: int = 0  # numbers in types that only another engine reads, and keeps as they are
    foreign_bytes: int = 0

    @classmethod
    def of(cls, tensors: Iterable[Plain]) -> Counted:
        matrices = rows = groups = vectors = foreign = foreign_bytes = 0
        for tensor in tensors:
            numbers = prod(tensor.shape)
            if any(part.info.dtype not in DTYPE_BYTES for part in tensor.parts.values()):
                foreign += numbers
                foreign_bytes += tensor.stored_bytes
            elif len(tensor.shape) < 2 or not numbers:
                vectors += numbers
            else:
                matrices += numbers
                rows += numbers // tensor.shape[-1]
                groups += numbers // tensor.shape[-1] * -(-tensor.shape[-1] // GROUP)
        return cls(matrices, rows, groups, vectors, foreign, foreign_bytes)

    @property
    def numbers(self) -> int:
        return self.matrices + self.vectors + self.foreign

    def bytes_as(self, quant: Quant, item: int) -> int:
        """With the matrices kept as `quant`, and what stays float in `item` bytes a number."""
        rest = self.vectors * item + self.foreign_bytes
        if quant == "none":
            return self.matrices * item + rest
        if quant in EXACT:
            codes = self.matrices if quant == "int8" else self.groups * GROUP_BYTES
            return codes + self.rows * SCALE_BYTES + rest
        if quant == "w8":
            return self.matrices + self.rows * item + rest
        return self.groups * (GROUP // 2 + 2 * item) + rest  # each with a step and a middle


@dataclass(frozen=True, slots=True)
class Counts:
    """A model's parts. `head` is without the embedding, also where it is tied to it."""

    layers: tuple[Counted, ...]
    embedding: Counted
    head: Counted
    state_layers: int = 0  # that keep a running state instead of keys and values
    experts: Counted = Counted()  # of all layers, which they are part of

    @property
    def parameters(self) -> int:
        return sum(part.numbers for part in (*self.layers, self.embedding, self.head))


def count(
    tensors: Mapping[str, Plain], layers: int, layer_of: Callable[[str], int | None]
) -> Counts:
    """`layer_of` says in which layer a tensor is, None for the ends of the model."""
    parts: dict[int | str, list[Plain]] = {}
    experts = [tensor for name, tensor in tensors.items() if EXPERTS in name]
    for name, tensor in tensors.items():
        end = "embedding" if "embed_tokens" in name else "head"
        layer = layer_of(name)
        parts.setdefault(end if layer is None else layer, []).append(tensor)
    return Counts(
        tuple(Counted.of(parts.get(layer, ())) for layer in range(layers)),
        Counted.of(parts.get("embedding", ())),
        Counted.of(parts.get("head", ())),
        _state_layers(tensors, layer_of),
        Counted.of(experts),
    )


def _state_layers(names: Iterable[str], layer_of: Callable[[str], int | None]) -> int:
    """Layers in which nothing attends that does not begin with a convolution."""
    owners = [(name, name.rsplit(".", 2)[0]) for name in names]
    convolving = {owner for name, owner in owners if CONVOLUTION in name}
    attending = {owner for name, owner in owners if "k_proj" in name} - convolving
    return len({layer_of(owner) for owner in convolving} - {layer_of(owner) for owner in attending})


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Bytes of a model's parts as they will lie in memory.

    When `tied`, embedding and head share a matrix: `head` includes it, and a stage with both ends
    holds it once. Running states are not counted: whoever takes all layers for ones with keys and
    values leaves room for some.
    """

    layers: tuple[int, ...]
    embedding: int
    head: int
    tied: bool
    kv_per_token: int  # of one layer that keeps keys and values
    kv_layers: int
    experts: int = 0  # of one layer, on average
    routed: float = 0.0  # the share of them that one token is sent to

    @property
    def whole(self) -> int:
        return sum(self.layers) + self.head + (0 if self.tied else self.embedding)

    @property
    def cache_per_token(self) -> int:
        return self.kv_per_token * self.kv_layers


def model_sizes(checkpoint: Checkpoint, quant: Quant, dtype: str | None = None) -> ModelSizes:
    """All but "none" round the matrices of layers, and the head to 8 bits. The embedding stays
    float, and so a tied head becomes a matrix of its own. `dtype` None is the checkpoint's own.
    """
    item = FLOAT_BYTES[check_dtype(dtype or checkpoint.dtype)]
    counts = checkpoint.counts
    heads: dict[Quant, Quant] = {"none": "none", "w8": "w8", "w4": "w8"}
    head_quant = heads.get(quant, "int8")
    head = counts.head.bytes_as(head_quant, item)
    if checkpoint.tied:
        head += counts.embedding.bytes_as(head_quant, item)
    return ModelSizes(
        tuple(layer.bytes_as(quant, item) for layer in counts.layers),
        counts.embedding.bytes_as("none", item),
        head,
        checkpoint.tied and quant == "none",
        kv_bytes_per_token(checkpoint.config, item, exact=quant in EXACT),
        len(counts.layers) - counts.state_layers,
        counts.experts.bytes_as(quant, item) // len(counts.layers),
        routed_share(checkpoint.config),
    )


def routed_share(config: Mapping[str, Any]) -> float:
    """Of a layer's experts, those that one token is sent to; 0.0 where there are none."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((config[name] for name in names if config.get(name)), 0)
    chosen = config.get("num_experts_per_tok") or config.get("experts_per_token") or 0
    return min(1.0, chosen / experts) if experts else 0.0


def kv_bytes_per_token(config: Mapping[str, Any], item: int, *, exact: bool) -> int:
    """Of one layer, from `config.json`; the stage measures it exactly once it is loaded."""
    if rank := config.get("kv_lora_rank"):  # multi-head latent attention keeps latents
        numbers, heads = int(rank + config.get("qk_rope_head_dim", 0)), 2
    else:
        queries = int(config.get("num_attention_heads") or 1)
        width = int(config.get("head_dim") or config["hidden_size"] // queries)
        heads = 2 * int(config.get("num_key_value_heads") or queries)
        numbers = heads * width
    return numbers * CODE_BYTES + heads * SCALE_BYTES if exact else numbers * item
