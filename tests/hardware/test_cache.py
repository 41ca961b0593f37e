import json
from pathlib import Path

import pytest

from shoal.hardware import Capability, Device, cache, load_or_measure
from shoal.hardware.capability import Rates

RATES = Rates(memory_bytes_per_s=1e10, f32_flops=2e11, bf16_flops=3e11, int8_ops=4e11)


class Machine:
    """Stands in for detection and measurement, and counts the measurements."""

    def __init__(self) -> None:
        self.measured = 0
        self.rates = RATES
        self.free_memory_bytes = 5
        self.devices = (Device("cpu", "Chip", 10),)

    def detect(self, *, gpus: bool) -> Capability:
        return Capability(
            cpu="Chip", free_memory_bytes=self.free_memory_bytes, devices=self.devices
        )

    def measure_rates(self, found: Capability) -> Rates:
        self.measured += 1
        return self.rates


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(cache, "detect", machine.detect)
    monkeypatch.setattr(cache, "measure_rates", machine.measure_rates)
    return machine


def test_the_second_start_measures_nothing_but_sees_the_memory_of_now(
    machine: Machine, tmp_path: Path
) -> None:
    file = tmp_path / "new" / "capability.json"
    first = load_or_measure(file)
    machine.free_memory_bytes = 3
    second = load_or_measure(file)
    assert machine.measured == 1
    assert first.with_rates(RATES) == first
    assert (second.f32_flops, second.free_memory_bytes) == (2e11, 3)
    assert [path.name for path in file.parent.iterdir()] == ["capability.json"]


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"\xff\x00",
        b"[]",
        b'{"machine": "Chip", "rates": {}}',
        b'{"machine": 5, "rates": {"f32_flops": 1}}',
    ],
)
def test_a_damaged_file_is_measured_again_and_replaced(
    machine: Machine, tmp_path: Path, damage: bytes
) -> None:
    file = tmp_path / "capability.json"
    file.write_bytes(damage)
    assert load_or_measure(file).f32_flops == 2e11
    load_or_measure(file)
    assert machine.measured == 1


def test_senseless_rates_in_the_file_are_measured_again(machine: Machine, tmp_path: Path) -> None:
    file = tmp_path / "capability.json"
    load_or_measure(file)
    content = json.loads(file.read_text())
    content["rates"]["int8_ops"] = -4.0
    file.write_text(json.dumps(content))
    assert load_or_measure(file).int8_ops == 4e11


def test_another_device_or_another_torch_is_measured_anew(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "capability.json"
    load_or_measure(file)
    machine.devices = (Device("cuda", "Card", 10), *machine.devices)
    load_or_measure(file)
    assert machine.measured == 2
    monkeypatch.setattr("torch.__version__", "99.0")
    load_or_measure(file)
    assert machine.measured == 3


def test_nothing_measured_is_not_remembered(machine: Machine, tmp_path: Path) -> None:
    machine.rates = Rates()
    load_or_measure(tmp_path / "capability.json")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_done_without(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert load_or_measure(tmp_path / "file" / "capability.json").f32_flops == 2e11
    (tmp_path / "folder" / "capability.json").mkdir(parents=True)
    assert load_or_measure(tmp_path / "folder" / "capability.json").f32_flops == 2e11
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["capability.json"]
