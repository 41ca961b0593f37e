"""What a node does between the parts it is made of."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shoal.config import Folders
from shoal.engine.thread import EngineThread
from shoal.hardware import Capability, Device
from shoal.identity import Mesh
from shoal.models import catalogue
from shoal.models.checkpoint import open_checkpoint
from shoal.node import Node, NodeConfig
from shoal.units import Slice

pytestmark = pytest.mark.anyio


async def test_what_changes_in_the_mesh_while_we_load_is_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.node.node.SETTLE_S", 0.0)
    folders = Folders.find({"SHOAL_HOME": str(tmp_path)})
    node: Any = Node(NodeConfig(folders=folders, mesh=Mesh.public("pond")))
    node._model, node.serving = open_checkpoint("shoal-tiny"), SimpleNamespace(slices=[])
    loaded: list[Slice] = []
    twice = asyncio.Event()

    async def choice(model: object) -> Slice:
        return Slice(0, 1 + len(loaded))

    async def serve(model: object, layers: Slice) -> None:
        loaded.append(layers)
        if len(loaded) == 1:
            node._view_changed.set()  # somebody left while we were loading
        else:
            twice.set()

    node._choice, node._serve = choice, serve
    following = asyncio.create_task(node._follow_the_mesh())
    node._view_changed.set()
    async with asyncio.timeout(5):
        await twice.wait()
    following.cancel()
    assert loaded == [Slice(0, 1), Slice(0, 2)]


def test_files_in_our_cache_that_cannot_be_read_are_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a stranger could end a node by naming them."""

    def unreadable(name: str, *, download: bool) -> None:
        raise PermissionError(name)

    monkeypatch.setattr(catalogue, "is_cached", lambda name: True)
    monkeypatch.setattr(catalogue, "open_checkpoint", unreadable)
    assert catalogue.Catalogue().known("club/model") is None


@pytest.mark.parametrize(
    ("gpu_bytes", "wish", "device", "offered"),
    [
        (1 << 30, "auto", "cuda:0", 1 << 29),
        (1 << 20, "auto", "cpu", 1 << 31),  # too small for the model
        (1 << 20, "cuda", "cuda:0", 1 << 19),
        (1 << 30, "cpu", "cpu", 1 << 31),
    ],
)
async def test_the_memory_that_is_offered_is_that_of_the_device_that_computes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpu_bytes: int,
    wish: str,
    device: str,
    offered: int,
) -> None:
    host = Device("cpu", "PC", 1 << 32)

    def detected(*_: object, gpus: bool = True) -> Capability:
        cards = (Device("cuda", "card", gpu_bytes),) if gpus else ()
        return Capability(memory_bytes=host.memory_bytes, devices=(*cards, host))

    monkeypatch.setattr("shoal.node.node.load_or_measure", detected)
    folders = Folders.find({"SHOAL_HOME": str(tmp_path)})
    config = NodeConfig(folders=folders, mesh=Mesh.public("pond"), memory="50%", device=wish)
    node: Any = Node(config)
    told: list[tuple[str, int]] = []
    node.serving = SimpleNamespace(compute_on=lambda *where: told.append(where))
    node.membership = SimpleNamespace(view=SimpleNamespace(announcements=list))
    async with EngineThread() as node._thread:
        node._offered_bytes = 0
        await node._look_around(gpus=wish != "cpu")
        await node._choose_device(open_checkpoint("shoal-tiny"))
    assert told == [(device, offered)]
    assert node._serving_config().device == device
    assert node._serving_config().memory_bytes == offered
    assert node.capability.devices[0].kind == device.partition(":")[0]
