"""Finds out what is there, without running anything on it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import psutil

from .capability import MOST_DEVICES, Capability, Device, clean_name
from .cgroup import memory_limits
from .probe import attempt, find_torch

ROOT = Path("/")


def detect(root: Path = ROOT, *, gpus: bool = True) -> Capability:
    """The machine without rates. `root` is where /proc and /sys are found.

    GPUs are looked for where torch is installed, which imports it: seconds, the first time.
    """
    cpu = clean_name(_cpu_name(root))
    total, free = _memory(root)
    torch = find_torch() if gpus else None
    found = _gpus(torch) if torch else []
    return Capability(
        cpu=cpu,
        cores=attempt(_cores, 1),
        memory_bytes=total,
        free_memory_bytes=free,
        devices=(*found[: MOST_DEVICES - 1], Device("cpu", cpu, total)),
    )


def _cpu_name(root: Path) -> str:
    asked = {"darwin": _ask_sysctl, "win32": platform.processor}.get(sys.platform)
    named = attempt(asked, "") if asked else attempt(lambda: _read_cpuinfo(root), "")
    return named or attempt(platform.machine, "")


def _read_cpuinfo(root: Path) -> str:
    """x86 writes "model name", small ARM boards "Model", others nothing of the kind."""
    lines = (root / "proc/cpuinfo").read_text(errors="replace").splitlines()
    fields = {key.strip().lower(): value for key, _, value in (s.partition(":") for s in lines)}
    return fields.get("model name") or fields.get("model") or ""


def _ask_sysctl() -> str:
    command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
    return subprocess.check_output(command, text=True, timeout=2)  # noqa: S603 (a constant)


def _cores() -> int:
    """The cores that this process may run on."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory(root: Path) -> tuple[int, int]:
    """Total and free bytes; 0 when unknown."""
    total, free = attempt(_machine_memory, (0, 0))
    for limit in memory_limits(root):
        if 0 < limit.limit_bytes < (total or sys.maxsize):
            total = limit.limit_bytes
        if total:
            free = min(free or total, limit.free_bytes)
    return max(0, total), max(0, free)


def _machine_memory() -> tuple[int, int]:
    memory = psutil.virtual_memory()
    return int(memory.total), int(memory.available)


def _gpus(torch: ModuleType) -> list[Device]:
    """CUDA (and ROCm, which torch calls by the same name) or Apple's."""
    nothing: list[Device] = []
    return [*attempt(lambda: _cuda(torch), nothing), *attempt(lambda: _mps(torch), nothing)]


def _cuda(torch: ModuleType) -> list[Device]:
    if not torch.cuda.is_available():
        return []
    cards = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [Device("cuda", clean_name(card.name), int(card.total_memory)) for card in cards]


def _mps(torch: ModuleType) -> list[Device]:
    if not torch.backends.mps.is_available():
        return []
    return [Device("mps", "Apple GPU", int(torch.mps.recommended_max_memory()))]
