"""Which device computes, and what memory is offered there."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import BadConfig
from .capability import Capability, Device
from .probe import find_torch

WISHES = re.compile(r"auto|cpu|mps|cuda(:\d{1,2})?")
INSTALL_CUDA = (
    "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu128"
)


@dataclass(frozen=True, slots=True)
class ChosenDevice:
    name: str  # as torch calls it
    memory_bytes: int


def check_wish(wish: str) -> str:
    """Raises BadConfig for what names no device."""
    if not WISHES.fullmatch(wish):
        raise BadConfig(
            f"{wish!r} is no device",
            hint="--device auto, cpu, cuda, cuda:1 for the second GPU, or mps on a Mac",
        )
    return wish


def choose_device(
    wish: str, found: Capability, fits: Callable[[int], bool] = lambda _: True
) -> ChosenDevice:
    """`fits` says whether so much memory of a device is enough for what is to be served.

    "auto" takes the CUDA GPU with the most memory where that is enough, or where the machine's own
    memory is not enough either; else the CPU. Raises BadConfig for a device that is not there.
    """
    host = ChosenDevice("cpu", found.memory_bytes)
    cards = [device for device in found.devices if device.kind == "cuda"]
    if check_wish(wish) == "cpu":
        return host
    if wish == "auto":
        if not cards:
            return host
        best = max(range(len(cards)), key=lambda at: cards[at].memory_bytes)
        room = cards[best].memory_bytes
        return _card(cards, best) if fits(room) or not fits(host.memory_bytes) else host
    kind, _, number = wish.partition(":")
    if kind == "mps":
        apple = [device for device in found.devices if device.kind == "mps"]
        if not apple:
            raise BadConfig(
                "there is no Apple GPU that torch can use here", hint="--device auto, or cpu"
            )
        return ChosenDevice("mps", apple[0].memory_bytes)
    if int(number or 0) >= len(cards):
        raise _missing(wish, len(cards))
    return _card(cards, int(number or 0))


def _card(cards: list[Device], at: int) -> ChosenDevice:
    return ChosenDevice(f"cuda:{at}", cards[at].memory_bytes)


def _missing(wish: str, cards: int) -> BadConfig:
    if cards:
        return BadConfig(
            f"there is no {wish}: torch finds {cards} GPUs, counted from 0",
            hint=f"--device cuda:{cards - 1}, or --device auto",
        )
    torch = find_torch()
    if torch is not None and not (torch.version.cuda or torch.version.hip):
        return BadConfig(
            f"the torch that is installed ({torch.__version__}) cannot use CUDA GPUs",
            hint=f"{INSTALL_CUDA}    (or --device cpu)",
        )
    return BadConfig(
        "torch finds no CUDA GPU here",
        hint="nvidia-smi must list it: install or update NVIDIA's driver; or --device cpu",
    )
