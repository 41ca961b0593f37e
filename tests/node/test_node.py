"""What a node does between the parts it is made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.config import Folders
from shoal.engine.thread import EngineThread
from shoal.hardware import Capability, Device
from shoal.identity import Mesh
from shoal.models import catalogue
from shoal.models.checkpoint import open_checkpoint
from shoal.node import NodeConfig
from shoal.node.machine import Machine
from shoal.pipeline.loading import history_bytes

pytestmark = pytest.mark.anyio


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

    monkeypatch.setattr("shoal.node.machine.load_or_measure", detected)
    folders = Folders.find({"SHOAL_HOME": str(tmp_path)})
    config = NodeConfig(folders=folders, mesh=Mesh.public("pond"), memory="50%", device=wish)
    told: list[tuple[str, int, int]] = []
    async with EngineThread() as thread:
        machine = Machine(config, thread)
        machine.compute_on = lambda *where: told.append(where)
        await machine.look_around(gpus=wish != "cpu")
        await machine.choose_device(open_checkpoint("shoal-tiny"), "none", None)
    ((told_device, for_slices, for_history),) = told
    assert (told_device, for_slices + for_history) == (device, offered)
    assert for_history == offered // 20
    assert machine.serving_config().device == device
    assert machine.serving_config().memory_bytes == machine.offered_bytes == for_slices
    assert machine.serving_config().history_bytes == for_history
    assert machine.capability.devices[0].kind == device.partition(":")[0]


def test_what_was_sent_on_never_takes_more_than_its_share_of_a_large_machine() -> None:
    assert history_bytes(1 << 40) == 256 << 20
    assert history_bytes(100) == 5
