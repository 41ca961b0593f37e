"""What a machine can do, as data. Announcements bring strangers' figures: all are checked."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

LONGEST_NAME = 100
MOST_DEVICES = 32


class Device(msgspec.Struct, frozen=True):
    """Something that torch can compute on, with the memory that models may use there."""

    kind: Literal["cpu", "cuda", "mps"]
    name: str
    memory_bytes: int

    def __post_init__(self) -> None:
        _check(self.name, self.memory_bytes)


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """Best measured speed of one device; 0.0 = unmeasured. A multiplication and an addition are
    two operations."""

    memory_bytes_per_s: float = 0.0
    f32_flops: float = 0.0
    bf16_flops: float = 0.0
    int8_ops: float = 0.0

    def __post_init__(self) -> None:
        _check("", self.memory_bytes_per_s, self.f32_flops, self.bf16_flops, self.int8_ops)


class Capability(msgspec.Struct, frozen=True, kw_only=True):
    """One machine. `devices` holds the fastest kind first and the CPU last; the rates are those of
    `devices[0]`. Memory is what this process may use, limits of its container included."""

    cpu: str = "unknown"
    cores: int = 1
    memory_bytes: int = 0  # 0 = unknown
    free_memory_bytes: int = 0
    devices: tuple[Device, ...] = ()
    memory_bytes_per_s: float = 0.0  # 0.0 = unmeasured
    f32_flops: float = 0.0
    bf16_flops: float = 0.0
    int8_ops: float = 0.0

    def __post_init__(self) -> None:
        _check(self.cpu, self.cores, self.memory_bytes, self.free_memory_bytes)
        _check("", self.memory_bytes_per_s, self.f32_flops, self.bf16_flops, self.int8_ops)
        if len(self.devices) > MOST_DEVICES:
            raise ValueError(f"more than {MOST_DEVICES} devices")

    def with_rates(self, rates: Rates) -> Capability:
        return msgspec.structs.replace(self, **msgspec.structs.asdict(rates))


def clean_name(name: str) -> str:
    """One printable line of bounded length: it will stand in other people's terminals."""
    printable = "".join(letter if letter.isprintable() else " " for letter in name)
    return " ".join(printable.split())[:LONGEST_NAME] or "unknown"


def _check(name: str, *numbers: float) -> None:
    if len(name) > LONGEST_NAME:
        raise ValueError(f"a name longer than {LONGEST_NAME} characters")
    if not all(math.isfinite(number) and number >= 0 for number in numbers):
        raise ValueError("a capability must be finite and not negative")
