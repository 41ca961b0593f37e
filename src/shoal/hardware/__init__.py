"""What this machine has: detected and measured, never looked up in a table of known chips.

Knows: the processor's name, cores, memory, GPUs, and how fast they read memory and multiply.
Does not know: models, slices, nodes, what the figures are good for.
A probe that fails leaves "unknown" or 0.0; an unknown chip is measured like any other.
torch is imported when it is there, and only when a function is called.
Start reading at `capability.py`.
"""

from .cache import load_or_measure
from .capability import Capability, Device
from .choice import ChosenDevice, check_wish, choose_device
from .detection import detect
from .speed import Speed

__all__ = [
    "Capability",
    "ChosenDevice",
    "Device",
    "Speed",
    "check_wish",
    "choose_device",
    "detect",
    "load_or_measure",
]
