"""Which slice of a model this node should hold: the mesh view in placement's terms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ..bus import Announcement
from ..config import parse_memory
from ..errors import BadConfig
from ..models.checkpoint import Checkpoint
from ..models.gguf_checkpoint import GgufCheckpoint
from ..models.sizes import FLOAT_BYTES, model_sizes
from ..pipeline import ServingConfig
from ..placement import Member, ModelShape, capacities, decide
from ..units import NodeId, Quant, QuantChoice, Slice

KV_TOKENS = (
    4096  # room for so many tokens is kept before weights are counted, unless told otherwise
)


# The fastest that keeps the built-in model's held-out loss within 0.5 %: bench/quality.py.
AUTO: Quant = "int8"


def compute_as(
    choice: QuantChoice,
    dtype: str | None,
    checkpoint: Checkpoint,
    others: Sequence[Announcement],
) -> tuple[Quant, str | None]:
    """How to keep this model's weights, and the float type: "auto" joins what the mesh computes the
    model in already, since stages work together only in one class.
    """
    if isinstance(checkpoint, GgufCheckpoint):  # computed as it is packed
        return "none", None
    if choice != "auto":
        return choice, dtype
    if dtype:
        return "none", dtype
    classes = Counter(
        offer.compute
        for each in others
        for offer in each.stages
        if offer.model == checkpoint.model_id and offer.state != "draining"
    )
    rounded: tuple[Quant, ...] = ("int8", "int4", "w8", "w4")
    known: dict[str, tuple[Quant, str | None]] = {name: (name, None) for name in rounded}
    known |= {name: ("none", name) for name in FLOAT_BYTES}
    for compute, _ in classes.most_common():
        if compute in known:
            return known[compute]
    return AUTO, None


def shape_of(checkpoint: Checkpoint, config: ServingConfig) -> ModelShape:
    """The model's parts as they will lie in memory: a GGUF file's as they lie on disk."""
    if isinstance(checkpoint, GgufCheckpoint):
        return ModelShape.measured(
            checkpoint.layer_bytes, checkpoint.slice_bytes, checkpoint.kv_bytes_per_token
        )
    sizes = model_sizes(checkpoint, config.quant, config.dtype)
    return ModelShape(
        sizes.layers,
        sizes.embedding,
        sizes.head,
        sizes.tied,
        sizes.kv_per_token,
        sizes.experts,
        sizes.routed,
    )


def fits_into(
    checkpoint: Checkpoint,
    layers: Slice | None,
    config: ServingConfig,
    share: str,
    memory_bytes: int,
) -> bool:
    """Whether these layers, or all, find room in this share of so much memory."""
    try:
        offered = parse_memory(share, memory_bytes)
    except BadConfig:  # an amount that is not there
        return False
    shape = shape_of(checkpoint, config)
    wanted = layers or checkpoint.whole
    kv_bytes = len(wanted) * shape.kv_bytes_per_token_per_layer * (config.kv_tokens or KV_TOKENS)
    return shape.slice_bytes(wanted) + kv_bytes <= offered


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
            if offer.compute == "served":  # a route of its own, which no slice can join
                return None
            leaving = offer.state == "draining"
            return None if leaving else Member(node.node, room, offer.layers, offer.pinned)
    able = checkpoint.model_id in node.can_serve and not node.stages
    return Member(node.node, room) if able else None
