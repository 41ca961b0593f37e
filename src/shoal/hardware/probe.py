"""Asks the machine, and takes no answer for an answer."""

from __future__ import annotations

import subprocess
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

T = TypeVar("T")

# All that files, drivers, psutil and torch raise when a machine is not as they expect: a type that
# the device lacks is a TypeError on MPS, an operation that torch lacks an AttributeError.
PROBE_ERRORS = (
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    subprocess.SubprocessError,
)


def attempt(probe: Callable[[], T], otherwise: T) -> T:
    """The probe's answer, or `otherwise` if it fails. Warnings of drivers are not passed on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return probe()
        except PROBE_ERRORS:
            return otherwise


def find_torch() -> ModuleType | None:
    """torch, or None where it is missing or broken. The first import takes seconds."""
    return attempt(_import_torch, None)


def _import_torch() -> ModuleType | None:
    import torch

    return torch
