"""What a node says about itself and its mesh, ready for JSON: the source of `shoal status`,
`peers`, `map` and `ps`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from ..bus import Announcement, StageOffer
from ..pipeline import FrontedWorker, StageWorker
from ..placement import Network, Trip
from ..placement.routes import MAX_STAGES
from ..placement.verdict import Verdict, if_lost, sentence, verdict
from ..units import ModelId, NodeId
from .distances import NEARBY_S
from .loads import as_held

FEWEST = 16  # stages that the figures of a model are taken from, however many models there are
MAX_MODELS = 64  # strangers may announce models without end, and each costs its number of layers


def stage_report(offer: StageOffer, worker: StageWorker | FrontedWorker | None) -> dict[str, Any]:
    """One row of `shoal ps`. There is no worker before the slice is loaded."""
    return {
        "model": offer.model,
        "model_name": offer.model_name,
        "layers": str(offer.layers),
        "total_layers": offer.total_layers,
        "state": offer.state,
        "compute": offer.compute,
        "pages_used": round(worker.sessions.pool.used_fraction, 4) if worker else 0.0,
        "free_tokens": offer.free_tokens,
        "total_tokens": offer.total_tokens,
        "context_length": offer.context_length,
        "sessions": len(worker.sessions) if worker else 0,
        "backend": worker.backend if isinstance(worker, FrontedWorker) else "",
    }


def node_report(announcement: Announcement, *, me: NodeId, age_s: float) -> dict[str, Any]:
    """One row of `shoal peers`. Addresses are counted, not shown."""
    return {
        "node": announcement.node,
        "name": announcement.name,
        "self": announcement.node == me,
        "age_s": round(age_s, 1),
        "software": announcement.software,
        "addresses": len(announcement.addresses),
        "memory_bytes": announcement.capability.memory_bytes,
        "memory_bytes_per_s": announcement.capability.memory_bytes_per_s,
        "gateway": announcement.gateway,
        "stages": [
            {
                "model": offer.model,
                "model_name": offer.model_name,
                "layers": str(offer.layers),
                "total_layers": offer.total_layers,
                "state": offer.state,
                "compute": offer.compute,
                "free_tokens": offer.free_tokens,
                "layer_seconds": offer.speed.seconds(1),
                "speed": msgspec.structs.asdict(offer.speed),
            }
            for offer in announcement.stages
        ],
    }


def model_reports(
    announcements: Sequence[Announcement],
    me: NodeId | None = None,
    latency: Callable[[NodeId, NodeId], float] = lambda a, b: NEARBY_S,
) -> list[dict[str, Any]]:
    """One entry for each model that anybody serves, with its weakest layer and what to expect of
    it, asked from `me`; of too many, those that the most nodes serve.
    """
    names = {announcement.node: announcement.name for announcement in announcements}
    offers: dict[
        tuple[ModelId, int], list[tuple[NodeId, StageOffer]]
    ] = {}  # a liar's layer count makes a model of its own
    for announcement in announcements:
        for offer in announcement.stages:
            key = offer.model, offer.total_layers
            offers.setdefault(key, []).append((announcement.node, offer))
    common = sorted(offers, key=lambda key: -len(offers[key]))[:MAX_MODELS]
    network = Network(latency)
    most = max(MAX_STAGES // max(len(common), 1), FEWEST)
    asker = me or NodeId("")

    def judged(model: ModelId, total: int) -> Verdict:
        stages = [as_held(node, offer) for node, offer in offers[model, total]]
        trip = Trip(total, asker, model=offers[model, total][0][1].model_name)
        return verdict(trip, stages, network, most)

    return [_model_report(*key, offers[key], names, judged(*key)) for key in sorted(common)]


def _model_report(
    model: ModelId,
    total: int,
    offers: Sequence[tuple[NodeId, StageOffer]],
    names: Mapping[NodeId, str],
    found: Verdict,
) -> dict[str, Any]:
    return {
        "model": model,
        "name": offers[0][1].model_name,
        "total_layers": total,
        "ready": found.ready,
        "weakest": found.holders,
        "weakest_layers": [str(layers) for layers in found.weakest],
        "missing": [str(layers) for layers in found.missing],
        "needed": [
            {"node": each.node, "name": names[each.node], "gone": if_lost(each, names[each.node])}
            for each in found.needed
        ],
        "first_token_s": round(found.first_token_s, 4),
        "one_tokens_per_s": round(found.one_tokens_per_s, 2),
        "all_tokens_per_s": round(found.all_tokens_per_s, 2),
        "verdict": sentence(found),
        "context_length": min(offer.context_length for _, offer in offers),
    }


def plain(value: object) -> Any:
    """A msgspec struct as dicts and lists."""
    return msgspec.to_builtins(value)
