"""What a node says about itself and its mesh, ready for JSON: the source of `shoal status`,
`peers`, `map` and `ps`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from ..bus import Announcement, StageOffer
from ..pipeline import FrontedWorker, StageWorker
from ..placement import coverage, missing
from ..units import ModelId, NodeId

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
            }
            for offer in announcement.stages
        ],
    }


def model_reports(announcements: Sequence[Announcement]) -> list[dict[str, Any]]:
    """One entry for each model that anybody serves, with its weakest layer; of too many, those
    that the most nodes serve.
    """
    offers: dict[
        tuple[ModelId, int], list[StageOffer]
    ] = {}  # a liar's layer count makes a model of its own
    for announcement in announcements:
        for offer in announcement.stages:
            offers.setdefault((offer.model, offer.total_layers), []).append(offer)
    common = sorted(offers, key=lambda key: -len(offers[key]))[:MAX_MODELS]
    return [_model_report(*key, offers[key]) for key in sorted(common)]


def _model_report(model: ModelId, total: int, offers: Sequence[StageOffer]) -> dict[str, Any]:
    serving = [offer.layers for offer in offers if offer.state == "serving"]
    held = coverage(total, serving)
    return {
        "model": model,
        "name": offers[0].model_name,
        "total_layers": total,
        "ready": min(held) > 0,
        "weakest": min(held),
        "missing": [str(layers) for layers in missing(total, serving)],
        "context_length": min(offer.context_length for offer in offers),
    }


def plain(value: object) -> Any:
    """A msgspec struct as dicts and lists."""
    return msgspec.to_builtins(value)
