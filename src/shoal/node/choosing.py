"""Which slice of a model this node should hold: the mesh view in placement's terms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..bus import Announcement, StageOffer
from ..config import parse_memory
from ..errors import BadConfig
from ..models.checkpoint import Checkpoint
from ..models.gguf_checkpoint import GgufCheckpoint
from ..models.sizes import FLOAT_BYTES, model_sizes
from ..pipeline import ServingConfig
from ..pipeline.loading import compute_class, history_bytes
from ..pipeline.stage_key import WHOLE
from ..placement import Capacities, Member, ModelShape, Pool, Wanted, capacities, decide
from ..placement.cost import predict
from ..units import ModelId, NodeId, Quant, QuantChoice, Slice

KV_TOKENS = (
    4096  # room for so many tokens is kept before weights are counted, unless told otherwise
)
MAX_DEMAND = 200.0  # tokens/s that one gateway may ask for: it may lie

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
    return shape.slice_bytes(wanted) + kv_bytes <= offered - history_bytes(offered)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model that we could serve, and the compute class in which we would."""

    model: ModelId
    shape: ModelShape
    compute: str
    kv_tokens: int = KV_TOKENS

    @property
    def whole(self) -> bool:
        return self.compute in WHOLE


def candidate(checkpoint: Checkpoint, config: ServingConfig) -> Candidate:
    return Candidate(
        checkpoint.model_id,
        shape_of(checkpoint, config),
        compute_class(checkpoint, config),
        config.kv_tokens or KV_TOKENS,
    )


def pool_of(
    me: Announcement, others: Sequence[Announcement], candidates: Sequence[Candidate]
) -> Pool:
    """The mesh as placement sees it: for each of our candidates the nodes that hold it in the same
    compute class, and those that hold nothing and could. That the latter would keep their weights
    as we do is an assumption.

    Our own stage counts as if it were not draining: it is ours to decide whether it goes on.
    """
    return Pool(
        tuple(
            Wanted(
                one.model, one.shape, _demand(one.model, (me, *others)), one.kv_tokens, one.whole
            )
            for one in candidates
        ),
        {
            one.model: [
                member
                for each in (me, *others)
                if (member := _member(one, each, me.node)) is not None
            ]
            for one in candidates
        },
    )


def choose(
    checkpoint: Checkpoint,
    me: Announcement,
    others: Sequence[Announcement],
    config: ServingConfig,
) -> Slice | None:
    """Our slice by the view of everybody; None when not one layer fits."""
    return decide(me.node, pool_of(me, others, [candidate(checkpoint, config)])).layers


def _demand(model: ModelId, announcements: Sequence[Announcement]) -> float:
    """Tokens/s in the whole mesh; of each gateway a bounded share, since it may lie."""
    asked = (
        min(demand.tokens_per_s, MAX_DEMAND)
        for each in announcements
        for demand in each.demand
        if demand.model == model
    )
    return sum(sorted(asked))


_capacities = lru_cache(maxsize=4096)(capacities)  # of all nodes, at each decision
_predict = lru_cache(maxsize=4096)(predict)


def _member(one: Candidate, node: Announcement, me: NodeId) -> Member | None:
    room = _capacities(one.shape, node.offered_bytes, one.kv_tokens)
    for offer in node.stages:
        if offer.model == one.model and offer.total_layers == one.shape.layers:
            return _holder(one, node, offer, room, me)
    ours = node.node == me
    busy = next((offer for offer in node.stages if ours or offer.state != "draining"), None)
    able = ours or one.model in node.can_serve
    if not (able and node.offered_bytes) or (busy and (busy.pinned or busy.compute == "served")):
        return None
    if node.stages and busy is None:  # about to leave, or to move
        return None
    return Member(
        node.node,
        room,
        speed=_predict(node.capability, one.shape, one.compute),
        memory_bytes=node.offered_bytes,
        place=node.place,
        elsewhere=busy.model if busy else None,
    )


def _holder(
    one: Candidate, node: Announcement, offer: StageOffer, room: Capacities, me: NodeId
) -> Member | None:
    """Slices work together only in one class: a stage in another is no help."""
    draining = offer.state == "draining" and node.node != me
    if draining or offer.compute != one.compute:
        return None
    return Member(
        node.node,
        room,
        offer.layers,
        offer.pinned,
        "serving" if offer.state == "draining" else offer.state,
        offer.speed,
        node.offered_bytes,
        node.place,
    )
