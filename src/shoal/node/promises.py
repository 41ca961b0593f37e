"""Nodes that say they are loading layers: others leave these to them, but not for ever."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..bus import Announcement
from ..units import ModelId, NodeId

LONGEST_S = 1800.0  # to load a slice; who is slower finds that others have filled its place


class Promises:
    """`clock` gives seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since: dict[tuple[NodeId, ModelId], float] = {}  # when we first saw it loading

    def kept(self, others: Sequence[Announcement]) -> list[Announcement]:
        """Without the nodes that have been loading a model for too long: they count for nothing
        until they serve it, or say that they do not.
        """
        now = self._clock()
        loading = [
            (each.node, offer.model)
            for each in others
            for offer in each.stages
            if offer.state == "joining"
        ]
        self._since = {key: self._since.get(key, now) for key in loading}
        late = {node for (node, _), since in self._since.items() if now - since > LONGEST_S}
        return [each for each in others if each.node not in late]
