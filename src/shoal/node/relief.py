"""Whether somebody may soon hold the layers that a route lacks."""

from __future__ import annotations

from collections.abc import Iterable

from ..bus import Announcement, StageOffer
from ..errors import Relief
from ..units import ModelId

SERVED = "served"  # by an engine of another make: it does not move


def relief(model: ModelId, nodes: Iterable[Announcement]) -> Relief:
    """`coming` while one of these loads layers of the model, or leaves its place for others."""
    found: Relief = "none"
    for node in nodes:
        if any(stage.model == model and _comes(stage) for stage in node.stages):
            return "coming"
        if _may_come(model, node):
            found = "possible"
    return found


def _comes(stage: StageOffer) -> bool:
    moves = stage.state == "draining" and not stage.pinned and stage.compute != SERVED
    return moves or stage.state == "joining"


def _may_come(model: ModelId, node: Announcement) -> bool:
    stays = any(stage.pinned or stage.compute == SERVED for stage in node.stages)
    return bool(node.offered_bytes) and model in node.can_serve and not stays
