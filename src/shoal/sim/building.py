"""Turns the tables of a scenario into what a world is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..bus.memory import MemoryRelay
from ..bus.memory_relay import Proved
from ..hardware import Capability, Device, Speed
from ..node.routing import RoutingConfig
from ..transport import MemoryConfig, MemoryNetwork
from ..transport.memory import Path
from ..units import NodeId, Slice
from .engine import more_bytes
from .machine import Machine, SpeedOf
from .model import SimModel
from .scenario import Link, Model, NodeType, Scenario, size
from .world import World, WorldConfig


@dataclass
class Regions:
    """Where each node is, and so how far from any other."""

    links: tuple[Link, ...]
    of: dict[NodeId, str] = field(default_factory=dict)
    _paths: dict[tuple[str, str], Path] = field(default_factory=dict)

    def path(self, a: NodeId, b: NodeId) -> Path:
        pair = self.of.get(a, ""), self.of.get(b, "")
        if pair not in self._paths:
            self._paths[pair] = _path(self._link(*pair))
        return self._paths[pair]

    def _link(self, a: str, b: str) -> Link:
        """The one that names both, else the one that names nobody."""
        wanted = tuple(sorted({a, b}))
        for link in self.links:
            if link.between and tuple(sorted(set(link.between))) == wanted:
                return link
        return next((link for link in self.links if not link.between), Link())


def _path(link: Link) -> Path:
    return Path(
        delay_s=link.delay_s,
        jitter_s=link.jitter_s,
        loss=link.loss,
        resend_s=max(0.01, 3 * link.delay_s),
        bytes_per_s=float(size(link.bytes_per_s)),
    )


def build(scenario: Scenario, seed: int, regions: Regions, *, keep_log: bool = False) -> World:
    """An empty world: nobody has joined yet."""
    proved, told = Proved(), scenario.relays
    relays = [
        MemoryRelay(
            f"memory://relay-{number}",
            delay_s=told.delay_s,
            jitter_s=told.jitter_s,
            loss=told.loss,
            outages=told.outages,
            seed=seed * 16 + number,
            proved=proved,
        )
        for number in range(told.count)
    ]
    return World(
        [sim_model(model) for model in scenario.models],
        seed=seed,
        network=MemoryNetwork(MemoryConfig(), seed=seed, paths=regions.path, weigh=more_bytes),
        relays=relays,
        config=WorldConfig(keep_log=keep_log, routing=RoutingConfig(mode=scenario.routing)),
    )


def sim_model(model: Model) -> SimModel:
    return SimModel(
        model.name,
        (size(model.layer_bytes),) * model.layers,
        kv_bytes=size(model.kv_bytes),
        activation_bytes=size(model.activation_bytes),
        embed_bytes=size(model.embed_bytes),
        head_bytes=size(model.head_bytes),
        context_length=model.context_length,
    )


def machine(kind: NodeType, models: Mapping[str, SimModel]) -> Machine:
    names = tuple(models) if kind.models is None else kind.models
    memory = size(kind.memory)
    capability = Capability(
        cpu=kind.name[:100],
        memory_bytes=memory,
        free_memory_bytes=memory,
        devices=(Device("cpu", kind.name[:100], memory),),
        memory_bytes_per_s=float(size(kind.memory_bytes_per_s)),
        int8_ops=kind.int8_ops,
    )
    return Machine(
        memory_bytes=memory,
        capability=capability,
        speed=_fixed(Speed(**kind.seconds)) if kind.seconds else None,
        load_bytes_per_s=float(size(kind.load_bytes_per_s)),
        models=tuple(models[name] for name in names) if memory else (),
        pinned=_slice(kind.layers) if kind.layers else None,
        gateway=kind.gateway,
        region=kind.region,
        kind=kind.name,
        exact=kind.texts,
    )


def _fixed(speed: Speed) -> SpeedOf:
    return lambda model, layers: speed


def _slice(text: str) -> Slice:
    start, stop = map(int, text.split(":"))
    return Slice(start, stop)
