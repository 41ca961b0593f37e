import sys
import time

import msgspec
import pytest
import torch

from shoal.hardware import Capability, Device, detect
from shoal.hardware.capability import Rates
from shoal.hardware.measurement import measure_rates
from shoal.hardware.probe import find_torch

HERE = Capability(devices=(Device("cpu", "here", 1 << 30),), free_memory_bytes=1 << 26)


def test_rates_are_measured_within_the_time_given() -> None:
    started = time.perf_counter()
    found = measure_rates(detect(), budget_s=0.4)
    assert time.perf_counter() - started < 2.0
    assert found.memory_bytes_per_s > 1e7
    assert min(found.f32_flops, found.bf16_flops, found.int8_ops) > 1e6


def test_measuring_leaves_no_trace_in_torch() -> None:
    def settings() -> tuple[object, ...]:
        state = hash(torch.get_rng_state().numpy().tobytes())
        kinds = (
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
        )
        return torch.get_num_threads(), state, kinds

    before = settings()
    measure_rates(HERE, budget_s=0.04)
    assert settings() == before


def test_what_the_device_cannot_do_stays_unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> torch.Tensor:
        raise TypeError("not supported on this device")

    monkeypatch.delattr(torch, "bfloat16")
    monkeypatch.setattr(torch, "_int_mm", unsupported)
    rates = measure_rates(HERE, budget_s=0.04)
    assert rates.bf16_flops == rates.int8_ops == 0.0
    assert min(rates.f32_flops, rates.memory_bytes_per_s) > 0


def test_a_device_that_is_not_there_is_unmeasured() -> None:
    gone = Capability(devices=(Device("mps", "gone", 1 << 30),))
    assert measure_rates(gone, budget_s=0.04) == Rates()


@pytest.mark.parametrize("broken", [False, True])
def test_without_torch_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, broken: bool) -> None:
    if broken:
        monkeypatch.setattr("shoal.hardware.probe._import_torch", lambda: {}["libtorch.so"])
    else:
        monkeypatch.setitem(sys.modules, "torch", None)
    assert find_torch() is None
    assert measure_rates(HERE) == Rates()


@pytest.mark.parametrize(
    "fields",
    [
        {"f32_flops": -1.0},
        {"memory_bytes_per_s": float("inf")},
        {"int8_ops": float("nan")},
        {"cores": -1},
        {"cpu": "x" * 101},
        {"devices": [{"kind": "tpu", "name": "", "memory_bytes": 1}]},
        {"devices": [{"kind": "cuda", "name": "", "memory_bytes": -1}]},
        {"devices": [{"kind": "cuda", "name": "", "memory_bytes": 1}] * 33},
    ],
)
def test_senseless_capabilities_of_strangers_do_not_decode(fields: dict[str, object]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(fields), type=Capability)


def test_a_capability_survives_the_wire() -> None:
    there = HERE.with_rates(Rates(f32_flops=2.5, int8_ops=1.0))
    wire = msgspec.msgpack.encode(there)
    assert msgspec.msgpack.decode(wire, type=Capability) == there
    assert there.f32_flops == 2.5
