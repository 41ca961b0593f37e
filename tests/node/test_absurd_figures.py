"""What strangers announce of themselves may be absurd: it must not keep us from deciding."""

from __future__ import annotations

import random
from itertools import product
from typing import Any

import pytest
from msgspec.structs import replace

from shoal.bus import Announcement
from shoal.bus.announcement import Demand
from shoal.bus.coordinates import Coordinates
from shoal.hardware import Capability, Speed
from shoal.node.choosing import Candidate, pool_of
from shoal.placement import ModelShape, decide
from shoal.units import ModelId, NodeId, Slice
from tests.bus.nodes import AMBER, STAGE, announcement

MODEL, OTHER = STAGE.model, ModelId("other")
SHAPE = ModelShape((100 << 20,) * 8, 50 << 20, 50 << 20, False, 4096, 50 << 20, 0.1)
ABSURD = (0.0, 5e-324, 1e-300, 1.0, 1e300, 1.7e308)
ME = replace(announcement(AMBER, 1), stages=(), offered_bytes=1 << 30, can_serve=(MODEL, OTHER))


class Stranger:
    """An announcement of a node of our choice, unsigned: placement reads no signatures."""

    def __init__(self, said: Announcement, node: str) -> None:
        self._said, self.node = said, NodeId(node)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._said, name)


def decided(*others: Any) -> None:
    found = decide(
        ME.node, pool_of(ME, others, [Candidate(each, SHAPE, "bf16") for each in (MODEL, OTHER)])
    )
    assert found.layers is None or found.layers.stop <= SHAPE.layers


@pytest.mark.parametrize(("memory", "ops"), list(product(ABSURD, ABSURD)))
def test_a_machine_that_announces_absurd_rates_stops_nobody(memory: float, ops: float) -> None:
    able = Capability(memory_bytes_per_s=memory, f32_flops=ops, bf16_flops=ops, int8_ops=ops)
    decided(Stranger(replace(ME, capability=able), "liar"))


@pytest.mark.parametrize(("layer_s", "token_s"), list(product(ABSURD, ABSURD)))
def test_a_stage_that_announces_absurd_speeds_stops_nobody(layer_s: float, token_s: float) -> None:
    speed = Speed(layer_s=layer_s, token_s=token_s, context_s=token_s, step_s=layer_s)
    decided(Stranger(replace(ME, stages=(replace(STAGE, speed=speed),)), "liar"))


def test_no_mixture_of_absurdities_stops_anybody() -> None:
    chance = random.Random(7)

    def any_of() -> float:
        return chance.choice(ABSURD)

    def stranger(name: str) -> Stranger:
        start = chance.randrange(SHAPE.layers)
        stage = replace(
            STAGE,
            model=chance.choice([MODEL, OTHER]),
            layers=Slice(start, chance.randint(start + 1, SHAPE.layers)),
            state=chance.choice(["joining", "serving", "draining"]),
            speed=Speed(layer_s=any_of(), token_s=any_of(), sample_s=any_of(), routed=0.5),
            pinned=chance.random() < 0.3,
        )
        far = chance.uniform(-10, 10)
        said = replace(
            ME,
            stages=(stage,) * chance.randint(0, 2),
            capability=Capability(memory_bytes_per_s=any_of(), bf16_flops=any_of()),
            place=Coordinates((far, -far, 10.0), 10.0, chance.choice([0.0, 5e-324, 1.0])),
            offered_bytes=chance.choice([0, 1, 1 << 28, 1 << 53]),
            demand=(Demand(OTHER, any_of()),),
        )
        return Stranger(said, name)

    for _ in range(60):
        decided(*(stranger(f"n{k}") for k in range(chance.choice([1, 3, 9, 30]))))
