"""Which slice of a model this node should hold: the mesh view in placement's terms."""

from __future__ import annotations

from collections.abc import Sequence

from ..bus import Announcement
from ..models.checkpoint import Checkpoint
from ..pipeline import ServingConfig
from ..placement import Member, ModelShape, capacities, decide
from ..units import NodeId, Slice

KV_TOKENS = (
    4096  # room for so many tokens is kept before weights are counted, unless told otherwise
)
BYTES = {"f32": 4, "bf16": 2, "f16": 2}


def shape_of(checkpoint: Checkpoint, config: ServingConfig) -> ModelShape:
    """The model's parts as they will lie in memory.

    int8 keeps a byte for each weight of layers and head; the embedding stays as it is, and so a
    tied head becomes a matrix of its own.
    """
    stored = ModelShape.measured(
        checkpoint.layer_bytes, checkpoint.slice_bytes, kv_bytes_per_token(checkpoint)
    )
    own, wanted = BYTES[checkpoint.dtype], BYTES[config.dtype or checkpoint.dtype]
    linear = 1 if config.quant == "int8" else wanted
    return ModelShape(
        tuple(size * linear // own for size in stored.layer_bytes),
        stored.embed_bytes * wanted // own,
        stored.head_bytes * linear // own,
        stored.tied and config.quant == "none",
        stored.kv_bytes_per_token_per_layer * wanted // own,
    )


def kv_bytes_per_token(checkpoint: Checkpoint) -> int:
    """Of one layer, from `config.json`; the stage measures it exactly once it is loaded."""
    config = checkpoint.config
    item = 4 if checkpoint.dtype == "f32" else 2
    if rank := config.get("kv_lora_rank"):  # multi-head latent attention keeps latents
        return int(rank + config.get("qk_rope_head_dim", 0)) * item
    heads = int(config.get("num_attention_heads") or 1)
    width = int(config.get("head_dim") or checkpoint.hidden_size // heads)
    return 2 * int(config.get("num_key_value_heads") or heads) * width * item


def choose(
    checkpoint: Checkpoint,
    me: Announcement,
    others: Sequence[Announcement],
    config: ServingConfig,
) -> Slice | None:
    """Our slice by the view of everybody; None when not one layer fits.

    A node takes part when it serves the model already, or is free and could. That others keep their
    weights in the same type as we do is an assumption: what they load is theirs to decide.
    """
    shape = shape_of(checkpoint, config)
    kv_tokens = config.kv_tokens or KV_TOKENS
    members = [
        member
        for each in (me, *others)
        if (member := _member(checkpoint, shape, kv_tokens, each)) is not None
    ]
    return decide(shape, NodeId(me.node), members)


def _member(
    checkpoint: Checkpoint, shape: ModelShape, kv_tokens: int, node: Announcement
) -> Member | None:
    room = capacities(shape, node.offered_bytes, kv_tokens)
    for offer in node.stages:
        if offer.model == checkpoint.model_id and offer.total_layers == checkpoint.layers:
            leaving = offer.state == "draining"
            return None if leaving else Member(node.node, room, offer.layers, offer.pinned)
    able = checkpoint.model_id in node.can_serve and not node.stages
    return Member(node.node, room) if able else None
