"""Who is in the mesh, as far as we have heard: a value, not a service."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from ..units import NodeId
from .announcement import Announcement

MAX_NODES = 4096

Seen = tuple[Announcement, float]  # with the time of receipt by our own clock


@dataclass(frozen=True, slots=True)
class MeshView:
    """Each method returns a new view; a node is alive by when WE heard it, never by its clock."""

    nodes: Mapping[NodeId, Seen] = field(default_factory=lambda: MappingProxyType({}))

    def applied(self, announcement: Announcement, now: float) -> MeshView:
        """With this announcement, unless we hold a newer one or the mesh is full."""
        known = self.nodes.get(announcement.node)
        if known is None and len(self.nodes) >= MAX_NODES:
            return self
        if known is not None and known[0].sequence > announcement.sequence:
            return self
        return _view({**self.nodes, announcement.node: (announcement, now)})

    def without(self, node: NodeId) -> MeshView:
        """After a goodbye."""
        return _view({key: seen for key, seen in self.nodes.items() if key != node})

    def expired(self, now: float, lifetime_s: float) -> tuple[MeshView, list[NodeId]]:
        """The view of those heard within `lifetime_s`, and who fell out of it, sorted."""
        gone = sorted(node for node, (_, seen) in self.nodes.items() if now - seen > lifetime_s)
        if not gone:
            return self, []
        return _view({k: seen for k, seen in self.nodes.items() if k not in set(gone)}), gone

    def announcements(self) -> list[Announcement]:
        """All of them, sorted by node id, so that every node reads the same list."""
        return [self.nodes[node][0] for node in sorted(self.nodes)]

    def get(self, node: NodeId) -> Announcement | None:
        seen = self.nodes.get(node)
        return seen[0] if seen else None

    def __len__(self) -> int:
        return len(self.nodes)


def _view(nodes: dict[NodeId, Seen]) -> MeshView:
    return MeshView(MappingProxyType(nodes))
