"""What `shoal up` shows: a few lines at the start, then one line for each change, all on stderr."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from ..events import (
    BackendChanged,
    Event,
    Leaving,
    NodeGone,
    NodeSeen,
    PeerFault,
    RelayChanged,
    StageChanged,
)
from ..units import ModelId, Slice
from .leave import in_words
from .output import check, note
from .reports import NodeReport
from .status import device, mesh_name

if TYPE_CHECKING:
    from ..node import Node


class Board:
    """Says what happens in one node, in the words of `shoal status`."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._names: dict[str, str] = {}
        self._leaving = False

    def introduce(self, *, new: bool) -> None:
        """Device, identity, mesh, address: all that is known before the layers are loaded."""
        report = self._report()
        up = sum(relay.connected for relay in report.relays)
        fresh = "  (new)" if new else ""
        check(True, "device", device(report.capability))
        check(True, "identity", f"{report.name} · {report.node}{fresh}")
        check(up > 0, "mesh", f"{mesh_name(report)} · {up} of {len(report.relays)} relays")
        note(f"  API  {self._node.api_url}/v1      another machine joins with: shoal invite")

    def settled(self) -> None:
        """The node serves what it is going to serve for now."""
        if self._report().stages:
            return
        check(True, "serving", "no layers: an API and a way into the mesh")
        for name in self._node.models_not_here():
            note(f"  the mesh serves {name}, whose files are not here: shoal up --model {name}")

    def end(self) -> None:
        """From here on, what goes down does so because we take it down."""
        self._leaving = True

    def leave(self) -> None:
        self.end()
        note("  leaving  the mesh is told; Ctrl-C once more leaves at once")

    def hurry(self) -> None:
        """The second signal."""
        note("  leaving  at once: what still runs here breaks off")
        self._node.hurry.set()

    def show(self, event: Event) -> None:
        """One line for what people want to know; the event log has the rest."""
        if self._leaving:
            if isinstance(event, Leaving) and (waits := in_words(event.sessions, event.answers)):
                note(f"  leaving  {waits} ...")
            return
        match event:
            case NodeSeen(node, name):
                self._names[node] = name
                check(True, "joined", name)
            case NodeGone(node, reason):
                check(False, "gone", f"{self._names.pop(node, node[:12])}: {reason}")
            case RelayChanged(url, connected):
                check(connected, "relay", url if connected else f"{url} is down, trying again")
            case StageChanged(model, layers, state):
                self._stage(model, layers, state)
            case BackendChanged(_, name, answers):
                check(answers, "backend", name if answers else f"{name}: waiting for it")
            case PeerFault(node, code, _):
                check(False, "dropped", f"{(node or 'a stranger')[:12]}: {code}")

    def _stage(self, model: ModelId, layers: Slice, state: str) -> None:
        names = {stage.model: stage.model_name for stage in self._report().stages}
        what = f"{names.get(model, model[:12])} layers {layers}"
        if state == "joining":
            note(f"  loading  {what} ...")
        else:
            check(state == "serving", "serving", what if state == "serving" else f"{what}: {state}")

    def _report(self) -> NodeReport:
        return msgspec.convert(self._node.status(), NodeReport)
