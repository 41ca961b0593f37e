"""Is the engine installed, and if not, which line installs it on this machine?"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
ENGINE_MODULES = ("torch", "transformers", "safetensors", "numpy", "accelerate")


def missing_modules() -> list[str]:
    """What the engine needs and this Python lacks; nothing is imported."""
    return [name for name in ENGINE_MODULES if find_spec(name) is None]


def installed_versions() -> str:
    """`torch 2.13.0 · transformers 5.23.1`."""
    return " · ".join(f"{name} {version(name)}" for name in ENGINE_MODULES[:2])


def install_line() -> str:
    """The exact command for this machine: CPU wheels where no GPU could use the others."""
    return pip_line(
        sys.executable, engine_requirements(), plain_torch=sys.platform != "linux" or has_nvidia()
    )


def pip_line(python: str, requirements: Iterable[str], *, plain_torch: bool) -> str:
    wanted = " ".join(f'"{requirement}"' for requirement in requirements)
    index = "" if plain_torch else f" --extra-index-url {CPU_WHEELS}"
    return f"{python} -m pip install {wanted}{index}"


def engine_requirements() -> list[str]:
    """The requirements of our extra `engine`, from our own metadata."""
    try:
        listed = requires("shoal") or []
    except PackageNotFoundError:
        listed = []
    split = (requirement.partition(";") for requirement in listed)
    return [name.strip() for name, _, marker in split if "engine" in marker] or ["shoal[engine]"]


def has_nvidia() -> bool:
    return shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia").exists()
