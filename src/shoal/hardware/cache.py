"""Remembers rates between starts, for as long as the machine is the same."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import msgspec

from .capability import Capability, Rates
from .detection import detect
from .measurement import measure_rates
from .probe import find_torch


class _Remembered(msgspec.Struct, frozen=True):
    machine: str
    rates: Rates


def load_or_measure(cache_file: Path, *, gpus: bool = True) -> Capability:
    """Detect, with GPUs or without; take the rates from `cache_file`, or measure and write them.

    A file that is damaged or of another machine is replaced; one that cannot be written is done
    without.
    """
    found = detect(gpus=gpus)
    machine = _describe(found)
    rates = _read(cache_file, machine)
    if rates is None:
        rates = measure_rates(found)
        if rates != Rates():
            _write(cache_file, _Remembered(machine, rates))
    return found.with_rates(rates)


def _describe(found: Capability) -> str:
    """Whatever changes the rates when it changes."""
    torch = find_torch()
    software = f"torch {torch.__version__}, {torch.get_num_threads()} threads" if torch else "-"
    devices = ", ".join(f"{device.kind} {device.name}" for device in found.devices)
    return f"{found.cpu}, {found.cores} cores, {software}, {devices}"


def _read(path: Path, machine: str) -> Rates | None:
    try:
        remembered = msgspec.json.decode(path.read_bytes(), type=_Remembered)
    except (OSError, ValueError):
        return None
    return remembered.rates if remembered.machine == machine else None


def _write(path: Path, remembered: _Remembered) -> None:
    """All or nothing: a reader never sees half a file."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(msgspec.json.encode(remembered))
            os.replace(draft, path)
        except OSError:
            os.unlink(draft)
            raise
