"""What a node computes, from what its user and the mesh want to what is loaded."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from msgspec.structs import replace

from shoal.bus import Announcement
from shoal.config import Folders
from shoal.errors import NoCapacity, UnsupportedModel
from shoal.hardware import Capability
from shoal.identity import Mesh
from shoal.models.catalogue import Catalogue
from shoal.models.checkpoint import Checkpoint, open_checkpoint
from shoal.node import NodeConfig
from shoal.node.machine import Machine
from shoal.node.slices import Around, Slices
from shoal.pipeline import Serving, ServingConfig
from shoal.placement import Decision
from shoal.units import ModelId, Slice
from tests.bus.nodes import AMBER, BIRCH, STAGE, announcement

TINY = open_checkpoint("shoal-tiny")
PLENTY = 1 << 30


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's announcement has to be waited for here."""
    monkeypatch.setattr("shoal.node.slices.FIRST_VIEW_S", 0.0)


@dataclass
class Served:
    checkpoint: Checkpoint
    layers: Slice
    pinned: bool = False
    how: tuple[str | None, str | None] = (None, None)


@dataclass
class Shelf:
    """Stands for Serving: remembers what was put there."""

    slices: list[Served] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    inexact: bool = False  # the model has no exact form

    async def serve(
        self, checkpoint: Checkpoint, layers: Slice, speed: object, *, pinned: bool, **how: Any
    ) -> None:
        self.log.append(f"serve {layers} {how['quant']}")
        if self.inexact and how["quant"] == "int8":
            raise UnsupportedModel("no exact form")
        self.slices = [Served(checkpoint, layers, pinned)]

    def stop(self) -> None:
        self.log.append("stop")
        self.slices = []


class Box:
    """Stands for the machine: `offered_bytes` is all that it has."""

    def __init__(self, offered_bytes: int) -> None:
        self.offered_bytes, self.capability = offered_bytes, Capability()
        self.chosen_for: list[str] = []

    async def look_around(self, *, gpus: bool) -> None:
        pass

    async def choose_device(self, model: Checkpoint, quant: str, dtype: str | None) -> None:
        self.chosen_for.append(model.name)

    def serving_config(self, quant: Any = "none", dtype: str | None = None) -> ServingConfig:
        return ServingConfig(
            memory_bytes=self.offered_bytes, kv_tokens=16, quant=quant, dtype=dtype
        )


class Home:
    def __init__(self, folder: Path, offered_bytes: int = PLENTY, **config: Any) -> None:
        folders = Folders.find({"SHOAL_HOME": str(folder)})
        self.others: list[Announcement] = []
        self.serving, self.machine = Shelf(), Box(offered_bytes)
        self.announced = 0
        self.slices = Slices(
            NodeConfig(folders=folders, mesh=Mesh.public("pond"), **config),
            cast(Machine, self.machine),
            Catalogue(),
            cast(Serving, self.serving),
            Around(
                me=self._me,
                others=lambda: self.others,
                models=self._models,
                announce=self._announce,
            ),
            emit=lambda event: None,
            clock=lambda: asyncio.get_running_loop().time(),
            chance=random.Random(1),
        )

    def _me(self) -> Announcement:
        stages = tuple(self._stage(each.layers) for each in self.serving.slices)
        return self.announcement(AMBER, stages, self.slices.can_serve())

    def announcement(self, who: Any, stages: Any, can_serve: Sequence[ModelId]) -> Announcement:
        offered = self.machine.offered_bytes
        return announcement(
            who, stages=tuple(stages), offered_bytes=offered, can_serve=tuple(can_serve)
        )

    @staticmethod
    def _stage(layers: Slice, **changes: Any) -> Any:
        return replace(STAGE, model=TINY.model_id, layers=layers, compute="int8", **changes)

    def other_holds(self, layers: str, **changes: Any) -> None:
        stage = self._stage(Slice.parse(layers), **changes)
        self.others.append(self.announcement(BIRCH, [stage], [TINY.model_id]))

    def _models(self) -> list[str]:
        return sorted({stage.model_name for each in self.others for stage in each.stages})

    def _announce(self) -> None:
        self.announced += 1

    def start(self, then: Callable[[], Any] = lambda: None) -> None:
        async def main() -> None:
            await self.slices.start(None)
            result = then()
            if asyncio.iscoroutine(result):
                await result

        asyncio.run(main())

    @property
    def held(self) -> list[tuple[str, bool]]:
        return [(str(each.layers), each.pinned) for each in self.serving.slices]


def test_what_the_user_pins_is_served_at_once_whatever_others_hold(tmp_path: Path) -> None:
    home = Home(tmp_path, model="shoal-tiny", layers=Slice(2, 5))
    home.other_holds("2:5")
    home.start()
    assert home.held == [("2:5", True)]
    assert not home.announced  # nobody's view is waited for


def test_the_first_node_of_a_mesh_serves_the_built_in_model(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.start()
    assert home.held == [("0:8", False)]
    assert home.announced == 1
    assert home.slices.names() == ["shoal-tiny"]
    assert home.slices.can_serve() == (TINY.model_id,)


def test_a_joiner_fills_the_hole_in_what_is_served(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.other_holds("0:5", pinned=True)
    home.start()
    assert home.held == [("5:8", False)]


def test_what_does_not_fit_is_said_and_nothing_is_loaded(tmp_path: Path) -> None:
    home = Home(tmp_path, 1000, model="shoal-tiny")
    with pytest.raises(NoCapacity, match="not one layer"):
        home.start()
    assert home.serving.log == []


def test_a_model_without_an_exact_form_is_served_in_floats_and_stays_so(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.serving.inexact = True
    home.start(lambda: home.slices.serve(TINY.model_id, Slice(0, 4)))
    first = ["stop", "serve 0:8 int8", "serve 0:8 none"]
    assert home.serving.log == [*first, "stop", "serve 0:4 none"]


def test_who_insists_on_the_exact_form_is_told_that_there_is_none(tmp_path: Path) -> None:
    home = Home(tmp_path, quant="int8")
    home.serving.inexact = True
    with pytest.raises(UnsupportedModel):
        home.start()


def test_another_slice_is_loaded_only_when_the_old_one_is_given_up(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.start(lambda: home.slices.serve(TINY.model_id, Slice(0, 3)))
    assert home.serving.log[2:] == ["stop", "serve 0:3 int8"]
    assert home.machine.chosen_for == ["shoal-tiny"]  # the same model: the same device


def test_a_node_that_only_asks_computes_nothing(tmp_path: Path) -> None:
    assert not Home(tmp_path, serve=False).slices.computes
    assert Home(tmp_path).slices.computes


def test_decisions_are_made_of_what_is_announced_now(tmp_path: Path) -> None:
    home = Home(tmp_path, TINY.slice_bytes(Slice(0, 8)) * 2 // 3)
    decisions: list[Decision] = []

    def look() -> None:
        home.other_holds("0:5", pinned=True)
        decisions.append(home.slices._decide(home.slices._view()))

    home.start(look)
    (decision,) = decisions
    assert decision.layers is not None
    assert decision.layers.stop == 8
    assert decision.layers.start <= 5
