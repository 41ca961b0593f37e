"""Ids and quantities that the whole house shares. Two things that mean different things are
different types.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NewType

import msgspec

from .errors import InvalidRequest

NodeId = NewType("NodeId", str)  # a node's Nostr public key, as npub1...
ModelId = NewType("ModelId", str)  # fingerprint of a checkpoint, 16 hex digits
SessionId = NewType("SessionId", str)  # chosen by the gateway, 16 hex digits
Seconds = NewType("Seconds", float)
Quant = Literal["none", "int8", "int4", "w8", "w4"]  # how weights are kept
QuantChoice = Literal["auto", "none", "int8", "int4", "w8", "w4"]
EXACT: tuple[Quant, ...] = ("int8", "int4")  # their results are the same everywhere


class Slice(msgspec.Struct, frozen=True, order=True, array_like=True):
    """Layers start..stop-1 of one model, counted as range() counts; written ``start:stop``."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(f"not a slice of layers: {self.start}:{self.stop}")

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.stop))

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}"

    def within(self, other: Slice) -> bool:
        """Whether `other` has all of these layers."""
        return other.start <= self.start and self.stop <= other.stop

    @classmethod
    def parse(cls, text: str) -> Slice:
        """Read ``"4:8"``. Raises InvalidRequest with the expected form."""
        start, colon, stop = text.partition(":")
        try:
            if not colon:
                raise ValueError(text)
            return cls(int(start), int(stop))
        except ValueError:
            raise InvalidRequest(
                f"{text!r} is not a range of layers",
                hint="write START:STOP, for example --layers 0:4 for the first four",
            ) from None


def readable_bytes(count: float) -> str:
    """12345678 -> '12 MB'. Decimal units, one decimal below 10, as users know them from Ollama."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count /= 1000
        units.pop(0)
    unit = units[0]
    return f"{count:.1f} {unit}" if count < 10 and unit != "B" else f"{count:.0f} {unit}"
