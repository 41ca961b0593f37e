"""Nodes and announcements for the tests of the bus."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import replace

from shoal.bus import Announcement, Bus, StageOffer
from shoal.hardware import Capability, Speed
from shoal.identity import Identity, Mesh
from shoal.units import ModelId, NodeId, Slice

AMBER, BIRCH, CORAL = (Identity.from_secret(letter * 32) for letter in (b"a", b"b", b"c"))
CLUB = Mesh.public("club")
SECRET_CLUB = Mesh.private(b"s" * 32)

STAGE = StageOffer(
    model=ModelId("0123456789abcdef"),
    model_name="shoal-tiny",
    total_layers=8,
    layers=Slice(0, 4),
    compute="bf16",
    state="serving",
    speed=Speed(layer_s=0.001, step_s=0.0005),
    sessions=0,
    queue=0,
    free_tokens=4096,
    total_tokens=8192,
    context_length=2048,
)
CAPABILITY = Capability(
    cpu="a processor",
    cores=2,
    memory_bytes=8 << 30,
    free_memory_bytes=4 << 30,
    devices=(),
    memory_bytes_per_s=1e10,
    f32_flops=1e10,
    bf16_flops=1e10,
    int8_ops=0.0,
)


def announcement(identity: Identity, sequence: int = 1, **changes: Any) -> Announcement:
    plain = Announcement(
        card=identity.card,
        name=identity.name,
        addresses=("192.168.1.4:7472", "[fe80::1]:7472"),
        capability=CAPABILITY,
        stages=(STAGE,),
        gateway=True,
        software="shoal 0.1.0",
        sequence=sequence,
        sent_at=int(time.time()),
    )
    return replace(plain, **changes).sign(identity)


@dataclass
class Ear:
    """Remembers what a bus told, and waits for more."""

    announced: list[Announcement] = field(default_factory=list)
    gone: list[NodeId] = field(default_factory=list)
    sealed: list[tuple[NodeId, bytes]] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def at(self, bus: Bus) -> Ear:
        bus.listen(self._note(self.announced), self._note(self.gone), self._on_sealed)
        return self

    def _note(self, heard: list[Any]) -> Callable[[Any], None]:
        def note(item: Any) -> None:
            heard.append(item)
            self.changed.set()

        return note

    def _on_sealed(self, sender: NodeId, payload: bytes) -> None:
        self.sealed.append((sender, payload))
        self.changed.set()

    def heard(self) -> list[tuple[NodeId, int]]:
        return [(said.node, said.sequence) for said in self.announced]

    async def until(self, holds: Callable[[], bool], timeout_s: float = 10.0) -> None:
        """Return once `holds()`; looked at whenever something was heard, and every 50 ms."""
        async with asyncio.timeout(timeout_s):
            while not holds():
                self.changed.clear()
                try:
                    async with asyncio.timeout(0.05):
                        await self.changed.wait()
                except TimeoutError:
                    continue
