"""AWQ in its "gemm" version: codes (inputs, outputs), eight outputs a word in an order of its own.

The word's codes, from the lowest bits up, are of the outputs 0 2 4 6 1 3 5 7.
"""

# N outputs · K inputs · G groups

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from .gptq import GroupSize, columns
from .layout import FLOATS, MAIN, Layout, Part

if TYPE_CHECKING:
    from torch import Tensor

    from .integers import Grouped

ZEROS, SCALES = "qzeros", "scales"
BITS, PER_WORD = 4, 8
PLACE = [0, 4, 1, 5, 2, 6, 3, 7]  # where in its word each output lies


class _Config(msgspec.Struct):
    bits: Literal[4] = 4
    w_bit: Literal[4] = 4
    group_size: GroupSize | None = None
    q_group_size: GroupSize | None = None
    version: Literal["gemm", "GEMM"] = "gemm"
    zero_point: Literal[True] = True


class Awq(Layout):
    title = "INT4 (AWQ)"
    plain = ".weight"
    endings = {  # noqa: RUF012 (ClassVar in the base)
        MAIN: (".qweight",),
        ZEROS: (".qzeros",),
        SCALES: (".scales",),
    }
    needed = frozenset({ZEROS, SCALES})
    dtypes = {  # noqa: RUF012
        MAIN: frozenset({"I32"}),
        ZEROS: frozenset({"I32"}),
        SCALES: FLOATS,
    }

    def __init__(self, group: int) -> None:
        self.group_size = group

    def shape(self, parts: Mapping[str, Part]) -> tuple[int, ...]:
        codes, scales = parts[MAIN].info.shape, parts[SCALES].info.shape
        if len(codes) != 2 or len(scales) != 2 or scales[1] != codes[1] * PER_WORD:
            raise self.refuse(parts[MAIN].name, f"{codes} words with {scales} scales")
        inputs = codes[0]
        if scales[0] != -(-inputs // columns(self.group_size, inputs)):
            raise self.refuse(parts[SCALES].name, f"{scales[0]} groups for {inputs} inputs")
        if parts[ZEROS].info.shape != (scales[0], codes[1]):
            raise self.refuse(parts[ZEROS].name, f"it has the shape {parts[ZEROS].info.shape}")
        return scales[1], inputs

    def floats(self, parts: Mapping[str, Tensor]) -> Tensor:
        return self.int4(parts).floats()

    def int4(self, parts: Mapping[str, Tensor]) -> Grouped:
        from .integers import Grouped, or_none

        codes, zeros = _unpacked(parts[MAIN]), _unpacked(parts[ZEROS])
        scales = parts[SCALES].float().t().contiguous()
        return Grouped(codes, scales, or_none(zeros), columns(self.group_size, codes.shape[1]))


def _unpacked(words: Tensor) -> Tensor:
    """(rows, words) -> (8 * words, rows) int8."""
    from .integers import signed, unpack

    held = unpack(words, BITS).view(len(words), -1, PER_WORD)[..., PLACE]
    return signed(held.flatten(1), BITS).t().contiguous()


def layouts(config: dict[str, Any]) -> tuple[Layout, ...]:
    found = msgspec.convert(config, _Config)
    size = found.group_size if found.group_size is not None else found.q_group_size
    return (Awq(size if size is not None else 128),)
