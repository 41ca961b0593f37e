"""GPTQ: `qweight` holds codes packed along the inputs, `qzeros` zero points along the outputs.

In version 1 every packed word of zero points is stored as if one had been taken from each code in
it; version 2 stores them as they are. `g_idx` is the group of each input, which with `desc_act` is
in no order.
"""

# N outputs · K inputs · G groups

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from .layout import FLOATS, MAIN, Layout, Part

if TYPE_CHECKING:
    from torch import Tensor

    from .integers import Grouped

ZEROS, SCALES, ORDER = "qzeros", "scales", "g_idx"
ONES = {4: 0x1111_1111, 8: 0x0101_0101}  # one in each code of a word
WHOLE = -1  # a group size: all inputs are one group
GroupSize = Annotated[int, msgspec.Meta(ge=-1, le=1 << 20)]


class _Config(msgspec.Struct):
    bits: Literal[4, 8]
    group_size: GroupSize
    checkpoint_format: Literal["gptq", "gptq_v2"] = "gptq"


class Gptq(Layout):
    plain = ".weight"
    endings = {  # noqa: RUF012 (ClassVar in the base)
        MAIN: (".qweight",),
        ZEROS: (".qzeros",),
        SCALES: (".scales",),
        ORDER: (".g_idx",),
    }
    needed = frozenset({ZEROS, SCALES})
    dtypes = {  # noqa: RUF012
        MAIN: frozenset({"I32"}),
        ZEROS: frozenset({"I32"}),
        SCALES: FLOATS,
        ORDER: frozenset({"I32"}),
    }

    def __init__(self, bits: Literal[4, 8], group: int, version: Literal[1, 2] = 1) -> None:
        self.title = f"INT{bits} (GPTQ)"
        self.bits, self.group_size, self.version = bits, group, version

    def shape(self, parts: Mapping[str, Part]) -> tuple[int, ...]:
        codes, scales = parts[MAIN].info.shape, parts[SCALES].info.shape
        if len(codes) != 2 or len(scales) != 2 or scales[1] != codes[1]:
            raise self.refuse(parts[MAIN].name, f"{codes} words with {scales} scales")
        per_word = 32 // self.bits
        inputs, outputs = codes[0] * per_word, codes[1]
        if scales[0] != -(-inputs // columns(self.group_size, inputs)):
            raise self.refuse(parts[SCALES].name, f"{scales[0]} groups for {inputs} inputs")
        if parts[ZEROS].info.shape != (scales[0], -(-outputs // per_word)):
            raise self.refuse(parts[ZEROS].name, f"it has the shape {parts[ZEROS].info.shape}")
        if ORDER in parts and parts[ORDER].info.shape != (inputs,):
            raise self.refuse(parts[ORDER].name, f"it has the shape {parts[ORDER].info.shape}")
        return outputs, inputs

    def floats(self, parts: Mapping[str, Tensor]) -> Tensor:
        return self._grouped(parts).floats()

    def int4(self, parts: Mapping[str, Tensor]) -> Grouped | None:
        found = self._grouped(parts)
        return found if self.bits == 4 and found.order is None else None

    def _grouped(self, parts: Mapping[str, Tensor]) -> Grouped:
        from .integers import Grouped, or_none, order_of, signed, unpack

        codes = signed(unpack(parts[MAIN].t(), self.bits), self.bits)
        scales = parts[SCALES].float().t().contiguous()
        words = parts[ZEROS] + ONES[self.bits] if self.version == 1 else parts[ZEROS]
        zeros = signed(unpack(words, self.bits)[:, : len(scales)], self.bits).t().contiguous()
        group = columns(self.group_size, codes.shape[1])
        order = order_of(parts.get(ORDER), group, scales.shape[1])
        return Grouped(codes, scales, or_none(zeros), group, order)


def columns(group_size: int, inputs: int) -> int:
    """Of one group; 0 and -1 mean all of them."""
    return group_size if group_size > 0 else max(1, inputs)


def layouts(config: dict[str, Any]) -> tuple[Layout, ...]:
    found = msgspec.convert(config, _Config)
    return (Gptq(found.bits, found.group_size, 2 if found.checkpoint_format == "gptq_v2" else 1),)
