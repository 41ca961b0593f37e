"""8-bit floats with float32 scales: `quant_method` fp8 (DeepSeek-V3, Qwen3-...-FP8), fbgemm_fp8
(Llama 3.1 405B) and compressed-tensors' float-quantized.

The scale multiplies, whatever its name: `weight_scale_inv` is the inverse of what divided. It is
one number, one for each row, or one for each block of rows and columns, cut off at the edges. Where
it is a power of two it may be stored as its exponent (E8M0). Integers with a scale for each row,
compressed-tensors' int-quantized, read just the same.
"""

# N rows (outputs) · K columns (inputs) · R, C blocks of rows and columns

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from .layout import FLOATS, MAIN, Layout, Part

if TYPE_CHECKING:
    from torch import Tensor

Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
Block = tuple[Size, Size]
SCALE = "scale"


class _Config(msgspec.Struct):
    weight_block_size: Block | None = None


class ScaledBytes(Layout):
    """One byte a weight, and scales. `block` is rows and columns of a block, None without any."""

    title = "FP8"
    plain = ""
    endings = {MAIN: ("",), SCALE: ("_scale_inv", "_scale")}  # noqa: RUF012 (ClassVar in the base)
    needed = frozenset({SCALE})
    dtypes = {  # noqa: RUF012
        MAIN: frozenset({"F8_E4M3", "F8_E5M2"}),
        SCALE: FLOATS | {"F8_E8M0", "U8"},
    }

    def __init__(self, block: Block | None = None) -> None:
        self.block = block

    def shape(self, parts: Mapping[str, Part]) -> tuple[int, ...]:
        shape, scale = parts[MAIN].info.shape, parts[SCALE].info.shape
        if len(shape) < 2:
            raise self.refuse(parts[MAIN].name, f"it has the shape {shape}")
        if scale not in self._known(shape):
            raise self.refuse(parts[SCALE].name, f"{scale} scales for a weight of {shape}")
        return shape

    def _known(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        *leading, rows, columns = shape
        known: list[tuple[int, ...]] = [(), (1,), (*leading, rows, 1), (*leading, 1, 1)]
        if not leading:
            known.append((rows,))
        if self.block is not None:
            known.append((*leading, -(-rows // self.block[0]), -(-columns // self.block[1])))
        return known

    def floats(self, parts: Mapping[str, Tensor]) -> Tensor:
        weight, scale = parts[MAIN].float(), scales(parts[SCALE])
        if scale.numel() == 1:
            return weight.mul_(scale.reshape(()))
        if scale.dim() == 1:
            scale = scale[:, None]
        if self.block is None or scale.shape[-2:] == (weight.shape[-2], 1):
            return weight.mul_(scale)
        height, width = self.block
        scale_RK = scale.repeat_interleave(width, -1)[..., : weight.shape[-1]]  # noqa: N806
        for block, row in enumerate(range(0, weight.shape[-2], height)):
            weight[..., row : row + height, :].mul_(scale_RK[..., block : block + 1, :])
        return weight


class ScaledIntegers(ScaledBytes):
    """compressed-tensors' int-quantized: int8, symmetric."""

    title = "INT8"
    dtypes = {**ScaledBytes.dtypes, MAIN: frozenset({"I8"})}  # noqa: RUF012


def scales(stored: Tensor) -> Tensor:
    """float32, also of scales that are stored as exponents."""
    import torch

    exponents = stored.dtype == torch.uint8
    return (stored.view(torch.float8_e8m0fnu) if exponents else stored).float()


def layouts(config: dict[str, Any]) -> tuple[Layout, ...]:
    return (ScaledBytes(msgspec.convert(config, _Config).weight_block_size),)
