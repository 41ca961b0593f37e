import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace as Fake
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.hardware import Device, detect, detection
from shoal.hardware.cgroup import memory_limits

GIB = 1 << 30


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 GiB, 12 of them free, Linux, no torch."""
    memory = Fake(total=16 * GIB, available=12 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(detection, "find_torch", lambda: None)
    monkeypatch.setattr(sys, "platform", "linux")


def write(root: Path, **files: str | bytes) -> Path:
    """Names are paths with `__` for `/`."""
    for name, content in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def fails(error: Exception) -> Callable[..., Any]:
    def probe(*_: object) -> Any:
        raise error

    return probe


def test_this_machine_is_detected() -> None:
    found = detect()
    assert found.cores >= 1
    assert found.cpu != ""
    assert found.devices[-1] == Device("cpu", found.cpu, found.memory_bytes)
    assert found.f32_flops == found.memory_bytes_per_s == 0.0


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ("processor\t: 0\nmodel name\t: AMD  EPYC\t9654 \n\nprocessor: 1", "AMD EPYC 9654"),
        ("processor: 0\nModel: Raspberry Pi 5\n", "Raspberry Pi 5"),
        ("model name: \x1b[31mred\x00\n", "[31mred"),
        ("model name: " + "x" * 500, "x" * 100),
    ],
)
def test_the_processor_is_named_in_one_clean_line(tmp_path: Path, content: str, name: str) -> None:
    assert detect(write(tmp_path, proc__cpuinfo=content)).cpu == name


@pytest.mark.parametrize("content", [None, "", "model name", "\x00" * 50, b"\xff\xfe: \xff"])
def test_an_unknown_processor_goes_by_the_name_of_its_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | bytes | None
) -> None:
    if content is not None:
        write(tmp_path, proc__cpuinfo=content)
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert detect(tmp_path).cpu == "riscv64"
    monkeypatch.setattr("platform.machine", lambda: "")
    assert detect(tmp_path).cpu == "unknown"


@pytest.mark.parametrize(
    "error", [OSError("no /proc"), RuntimeError(), ValueError(), KeyError("MemAvailable:")]
)
def test_a_machine_that_answers_nothing_is_still_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    for name in ("psutil.virtual_memory", "os.sched_getaffinity", "platform.machine"):
        monkeypatch.setattr(name, fails(error), raising=False)
    found = detect(tmp_path)
    assert (found.cpu, found.cores, found.memory_bytes) == ("unknown", 1, 0)
    assert found.devices == (Device("cpu", "unknown", 0),)


def test_apples_and_windows_processors_are_asked_their_own_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(subprocess, "check_output", lambda *_, **__: "Apple M9\n")
    assert detect(tmp_path).cpu == "Apple M9"
    monkeypatch.setattr(subprocess, "check_output", fails(subprocess.TimeoutExpired("sysctl", 2)))
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert detect(tmp_path).cpu == "arm64"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr("platform.processor", lambda: "Intel64 Family 6")
    assert detect(tmp_path).cpu == "Intel64 Family 6"


def test_a_container_of_version_two_may_use_what_its_limit_leaves(tmp_path: Path) -> None:
    root = write(tmp_path, proc__self__cgroup="0::/\n")
    write(root, **{"sys__fs__cgroup__memory.max": f"{4 * GIB}\n"})
    assert detect(root).memory_bytes == 4 * GIB
    assert detect(root).free_memory_bytes == 4 * GIB
    write(root, **{"sys__fs__cgroup__memory.current": f"{3 * GIB}"})
    assert detect(root).free_memory_bytes == 1 * GIB
    write(root, **{"sys__fs__cgroup__memory.stat": f"anon 5\ninactive_file {GIB}\n"})
    assert detect(root).free_memory_bytes == 2 * GIB
    assert detect(root).devices[-1].memory_bytes == 4 * GIB


def test_the_narrowest_of_nested_groups_counts(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        proc__self__cgroup="0::/user.slice/app.service\n",
        **{
            "sys__fs__cgroup__user.slice__memory.max": f"{2 * GIB}",
            "sys__fs__cgroup__user.slice__app.service__memory.max": "max",
        },
    )
    assert detect(root).memory_bytes == 2 * GIB


def test_a_container_of_version_one_is_seen_even_where_its_path_is_not(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        proc__self__cgroup="9:cpu:/x\n4:memory,hugetlb:/docker/abc\n0::/\n",
        **{
            "sys__fs__cgroup__memory__memory.limit_in_bytes": f"{3 * GIB}",
            "sys__fs__cgroup__memory__memory.usage_in_bytes": f"{1 * GIB}",
        },
    )
    found = detect(root)
    assert (found.memory_bytes, found.free_memory_bytes) == (3 * GIB, 2 * GIB)


@pytest.mark.parametrize("limit", ["max", "9223372036854771712", "", "-", "0x10", f"{64 * GIB}"])
def test_no_limit_or_a_senseless_one_leaves_the_machines_memory(
    tmp_path: Path, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write(tmp_path, proc__self__cgroup="0::/\n", **{"sys__fs__cgroup__memory.max": limit})
    found = detect(root)
    assert (found.memory_bytes, found.free_memory_bytes) == (16 * GIB, 12 * GIB)
    if limit != f"{64 * GIB}":
        monkeypatch.setattr(psutil, "virtual_memory", fails(OSError()))
        assert detect(root).memory_bytes == 0


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40) | st.from_regex(r"([0-9]:(memory)?:/[a./]*\n){1,3}"), st.binary())
def test_no_content_of_proc_and_sys_can_crash_it(
    tmp_path_factory: pytest.TempPathFactory, groups: str, content: bytes
) -> None:
    root = tmp_path_factory.mktemp("root")
    write(root, proc__self__cgroup=groups, proc__cpuinfo=content)
    for name in ("memory.max", "memory.current", "memory.stat"):
        write(root, **{f"sys__fs__cgroup__{name}": content})
    assert detect(root).cores >= 1


def test_a_group_outside_the_mount_is_not_read(tmp_path: Path) -> None:
    write(tmp_path, proc__self__cgroup="0::/../../secret\n")
    write(tmp_path, sys__fs__cgroup__tasks="", **{"sys__secret__memory.max": "5"})
    assert memory_limits(tmp_path) == []


def test_gpus_are_listed_before_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Fake(name="Some  GPU", total_memory=8 * GIB)
    torch = Fake(
        cuda=Fake(
            is_available=lambda: True, device_count=lambda: 2, get_device_properties=lambda _: card
        ),
        backends=Fake(mps=Fake(is_available=lambda: True)),
        mps=Fake(recommended_max_memory=lambda: 5 * GIB),
    )
    monkeypatch.setattr(detection, "find_torch", lambda: torch)
    kinds = [(d.kind, d.name, d.memory_bytes) for d in detect().devices[:-1]]
    assert kinds == [("cuda", "Some GPU", 8 * GIB)] * 2 + [("mps", "Apple GPU", 5 * GIB)]


@pytest.mark.parametrize("error", [RuntimeError("driver too old"), OSError(), AttributeError()])
def test_a_broken_driver_leaves_the_processor(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    torch = Fake(
        cuda=Fake(
            is_available=lambda: True,
            device_count=lambda: 1,
            get_device_properties=fails(error),
        ),
        backends=Fake(),
    )
    monkeypatch.setattr(detection, "find_torch", lambda: torch)
    assert [device.kind for device in detect().devices] == ["cpu"]


def test_the_folder_is_imported_without_torch() -> None:
    program = "import sys, shoal.hardware; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert answer.stdout.strip() == "False"
