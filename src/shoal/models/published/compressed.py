"""The formats of `quant_method` compressed-tensors: pack-quantized integers (Kimi-K2), and one byte
a weight (`fp8.py`).

pack-quantized: `weight_packed` holds codes along the inputs, the lowest bits first, with the middle
of their range added; `weight_shape` says how many inputs there really are; `weight_zero_point` is
packed along the outputs; `weight_g_idx` is the group of each input.
"""

# N outputs · K inputs · G groups

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from .fp8 import Block, ScaledBytes, ScaledIntegers
from .gptq import GroupSize, columns
from .layout import FLOATS, MAIN, Layout, Part

if TYPE_CHECKING:
    from torch import Tensor

    from .integers import Grouped

SCALE, SHAPE, ZEROS, ORDER = "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"


class _Weights(msgspec.Struct):
    num_bits: Literal[4, 8]
    type: Literal["int", "float"] = "int"
    strategy: Literal["tensor", "channel", "group", "block"] | None = None
    symmetric: bool = True
    group_size: GroupSize | None = None
    block_structure: Block | None = None


class _Group(msgspec.Struct):
    weights: _Weights | None = None
    format: str | None = None


class _Sparsity(msgspec.Struct):
    format: Literal["dense"] = "dense"


class _Config(msgspec.Struct):
    config_groups: dict[str, _Group]
    format: str = "dense"
    sparsity_config: _Sparsity | None = None


class PackedIntegers(Layout):
    plain = ".weight"
    endings = {  # noqa: RUF012 (ClassVar in the base)
        MAIN: (".weight_packed",),
        SCALE: (".weight_scale",),
        SHAPE: (".weight_shape",),
        ZEROS: (".weight_zero_point",),
        ORDER: (".weight_g_idx",),
    }
    needed = frozenset({SCALE, SHAPE})
    dtypes = {  # noqa: RUF012
        MAIN: frozenset({"I32"}),
        SCALE: FLOATS,
        SHAPE: frozenset({"I64", "I32"}),
        ZEROS: frozenset({"I32"}),
        ORDER: frozenset({"I32", "I64"}),
    }

    def __init__(self, bits: Literal[4, 8], group: int, *, symmetric: bool = True) -> None:
        self.title = f"INT{bits} (pack-quantized)"
        self.bits, self.group_size, self.symmetric = bits, group, symmetric

    def shape(self, parts: Mapping[str, Part]) -> tuple[int, ...]:
        """Where inputs do not fill their last word this counts the room that is left, too."""
        codes, scale = parts[MAIN].info.shape, parts[SCALE].info.shape
        if len(codes) != 2 or len(scale) != 2 or scale[0] != codes[0]:
            raise self.refuse(parts[MAIN].name, f"{codes} words with {scale} scales")
        outputs, groups = scale
        inputs = codes[1] * 32 // self.bits
        if groups != -(-inputs // columns(self.group_size, inputs)):
            raise self.refuse(parts[SCALE].name, f"{groups} groups for {inputs} inputs")
        if parts[SHAPE].info.shape != (2,):
            raise self.refuse(parts[SHAPE].name, f"it has the shape {parts[SHAPE].info.shape}")
        if (ZEROS in parts) == self.symmetric:
            raise self.refuse(parts[MAIN].name, f"{ZEROS} is there only when it is not symmetric")
        if ZEROS in parts and parts[ZEROS].info.shape != (-(-outputs * self.bits // 32), groups):
            raise self.refuse(parts[ZEROS].name, f"it has the shape {parts[ZEROS].info.shape}")
        return outputs, inputs

    def floats(self, parts: Mapping[str, Tensor]) -> Tensor:
        return self._grouped(parts).floats()

    def int4(self, parts: Mapping[str, Tensor]) -> Grouped | None:
        found = self._grouped(parts)
        return found if self.bits == 4 and found.order is None else None

    def _grouped(self, parts: Mapping[str, Tensor]) -> Grouped:
        from .integers import Grouped, or_none, order_of, signed, unpack

        words, scales = parts[MAIN], parts[SCALE].float()
        outputs, inputs = parts[SHAPE].tolist()
        if outputs != len(words) or -(-inputs * self.bits // 32) != words.shape[1]:
            raise self.refuse(SHAPE, f"({outputs}, {inputs}) in {tuple(words.shape)} words")
        if ORDER in parts and parts[ORDER].shape != (inputs,):
            raise self.refuse(ORDER, f"{tuple(parts[ORDER].shape)} groups of {inputs} inputs")
        codes = signed(unpack(words, self.bits)[:, :inputs], self.bits)
        zeros = None
        if ZEROS in parts:
            held = unpack(parts[ZEROS].t(), self.bits)[:, :outputs]
            zeros = or_none(signed(held, self.bits).t().contiguous())
        group = columns(self.group_size, inputs)
        return Grouped(
            codes, scales, zeros, group, order_of(parts.get(ORDER), group, scales.shape[1])
        )


def layouts(config: dict[str, Any]) -> tuple[Layout, ...]:
    """Raises UnsupportedModel when two groups would read the same tensors differently."""
    found = msgspec.convert(config, _Config)
    made = list(_layouts(found))
    if len({type(layout) for layout in made}) < len(made):
        raise msgspec.ValidationError("groups of weights that differ in bits or group size")
    return tuple(made)


def _layouts(config: _Config) -> Iterator[Layout]:
    seen: list[tuple[str, _Weights]] = []
    for group in config.config_groups.values():
        stored = group.format or config.format
        if group.weights is None or (stored, group.weights) in seen:
            continue
        seen.append((stored, group.weights))
        yield _layout(stored, group.weights)


def _layout(stored: str, weights: _Weights) -> Layout:
    size = (weights.group_size or -1) if weights.strategy == "group" else -1
    match stored, weights.type, weights.num_bits:
        case "pack-quantized", "int", bits if weights.strategy in ("group", "channel"):
            return PackedIntegers(bits, size, symmetric=weights.symmetric)
        case "float-quantized" | "naive-quantized", "float", 8 if weights.strategy != "group":
            return ScaledBytes(weights.block_structure)
        case "int-quantized" | "naive-quantized", "int", 8 if weights.symmetric:
            return ScaledIntegers(weights.block_structure)
    raise msgspec.ValidationError(
        f"{weights.num_bits}-bit {weights.type} weights as {stored!r} by {weights.strategy}"
    )
