"""What a running node says of itself and its mesh: the JSON of `/v1/node` and `/v1/mesh`, typed.

Every field has a default, so that this command line also reads a node of another version.
"""

from __future__ import annotations

import msgspec

from ..units import Slice


class MeshName(msgspec.Struct, frozen=True):
    label: str = ""
    private: bool = False


class Relay(msgspec.Struct, frozen=True):
    url: str = ""
    connected: bool = False
    attempts: int = 0
    error: str | None = None


class Hardware(msgspec.Struct, frozen=True):
    cpu: str = ""
    cores: int = 0
    memory_bytes: int = 0
    free_memory_bytes: int = 0
    memory_bytes_per_s: float = 0.0


class Peer(msgspec.Struct, frozen=True):
    """The far end of a live link."""

    node: str = ""
    name: str = ""


class OwnStage(msgspec.Struct, frozen=True):
    """A slice in service on the node that answers."""

    model: str = ""
    model_name: str = ""
    layers: str = "0:1"
    state: str = ""
    compute: str = ""
    pages_used: float = 0.0
    free_tokens: int = 0
    total_tokens: int = 0
    sessions: int = 0
    backend: str = ""  # the engine of another make that computes it, and how it is spoken to


class NodeReport(msgspec.Struct, frozen=True):
    node: str = ""
    name: str = ""
    version: str = ""
    uptime_s: float = 0.0
    leaving: bool = False
    answers: int = 0  # to clients of its own that run
    placement: str = ""  # why it holds what it holds
    mesh: MeshName = MeshName()
    relays: list[Relay] = []
    clock_behind_s: float = 0.0  # this machine's clock, by what the others' say
    addresses: list[str] = []
    capability: Hardware = Hardware()
    stages: list[OwnStage] = []
    links: list[Peer] = []
    faults: dict[str, int] = {}
    ticket: str | None = None


class MeshStage(msgspec.Struct, frozen=True):
    """A slice in service on some node of the mesh."""

    model: str = ""
    model_name: str = ""
    layers: str = "0:1"
    total_layers: int = 1
    state: str = ""
    compute: str = ""
    free_tokens: int = 0
    layer_seconds: float = 0.0

    @property
    def slice(self) -> Slice:
        return Slice.parse(self.layers)


class MeshNode(msgspec.Struct, frozen=True):
    node: str = ""
    name: str = ""
    self: bool = False
    age_s: float = 0.0
    software: str = ""
    addresses: int = 0
    memory_bytes: int = 0
    memory_bytes_per_s: float = 0.0
    gateway: bool = False
    stages: list[MeshStage] = []

    @property
    def label(self) -> str:
        return f"{self.name} (this one)" if self.self else self.name


class Needed(msgspec.Struct, frozen=True):
    """A node that alone holds some layers, and what would be `gone` without it, in words."""

    node: str = ""
    name: str = ""
    gone: str = ""


class MeshModel(msgspec.Struct, frozen=True):
    """How well one model is covered. `weakest` counts the holders of its rarest layer. Tokens a
    second are those that one reader can expect, and all together.
    """

    model: str = ""
    name: str = ""
    total_layers: int = 1
    ready: bool = False
    weakest: int = 0
    weakest_layers: list[str] = []
    missing: list[str] = []
    needed: list[Needed] = []
    first_token_s: float = 0.0
    one_tokens_per_s: float = 0.0
    all_tokens_per_s: float = 0.0
    verdict: str = ""
    context_length: int = 0


class MeshReport(msgspec.Struct, frozen=True):
    nodes: list[MeshNode] = []
    models: list[MeshModel] = []

    def model(self, name: str) -> MeshModel | None:
        """The model of that name or id; ids may be cut short when they stay unique. Nodes that
        were given a folder may call it by another name than the others.
        """
        exact = [m for m in self.models if name in (m.name, m.model)]
        called = {s.model for n in self.nodes for s in n.stages if s.model_name == name}
        exact = exact or [m for m in self.models if m.model in called]
        close = exact or [m for m in self.models if m.model.startswith(name)]
        return close[0] if len(close) == 1 or exact else None

    def holders(self, model: str) -> list[tuple[MeshNode, MeshStage]]:
        """Who holds which layers of the model with that id, by first layer."""
        held = [(n, s) for n in self.nodes for s in n.stages if s.model == model]
        return sorted(held, key=lambda one: (one[1].slice, one[0].name))
