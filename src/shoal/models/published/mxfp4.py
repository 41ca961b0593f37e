"""4-bit floats in blocks of 32 that share an exponent: `quant_method` mxfp4, gpt-oss' experts.

`X_blocks` holds two E2M1 codes a byte, the earlier one in the low half; `X_scales` the exponents
plus 127 (E8M0). They lie as (experts, outputs, inputs), while the architecture's own weight is
(experts, inputs, outputs).
"""

# E experts · N outputs · K inputs · G = K / 32 blocks

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .layout import MAIN, Layout, Part

if TYPE_CHECKING:
    from torch import Tensor

SCALES = "scales"
BLOCK_BYTES, BLOCK = 16, 32
BIAS = 127
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = (*MAGNITUDES, *(-value for value in MAGNITUDES))  # of the codes 0..15


@dataclass(frozen=True, slots=True)
class Fp4:
    """A weight is VALUES[code] * 2 ** exponent of its block of 32 inputs."""

    codes: Tensor  # (..., N, K) uint8 in 0..15
    exponents: Tensor  # (..., N, K / 32) int16


class Mxfp4(Layout):
    title = "MXFP4"
    plain = ""
    endings = {MAIN: ("_blocks",), SCALES: ("_scales",)}  # noqa: RUF012 (ClassVar in the base)
    needed = frozenset({SCALES})
    dtypes = {MAIN: frozenset({"U8"}), SCALES: frozenset({"U8", "F8_E8M0"})}  # noqa: RUF012

    def shape(self, parts: Mapping[str, Part]) -> tuple[int, ...]:
        blocks, scales = parts[MAIN].info.shape, parts[SCALES].info.shape
        if len(blocks) < 3 or blocks[-1] != BLOCK_BYTES or scales != blocks[:-1]:
            raise self.refuse(parts[MAIN].name, f"{blocks} bytes with {scales} exponents")
        *leading, rows, groups, _ = blocks
        return (*leading, groups * BLOCK, rows)

    def floats(self, parts: Mapping[str, Tensor]) -> Tensor:
        """bfloat16, which holds every product exactly."""
        import torch

        blocks, table = parts[MAIN].flatten(0, -4), _pairs_by_byte()
        scale = parts[SCALES].view(torch.float8_e8m0fnu).bfloat16().flatten(0, -3)[..., None]
        width, rows = blocks.shape[-2] * BLOCK, blocks.shape[-3]
        out = torch.empty(len(blocks), width, rows, dtype=torch.bfloat16)
        for expert in range(len(blocks)):
            pairs = table[blocks[expert].int()].flatten(-2)
            out[expert] = pairs.mul_(scale[expert]).view(rows, width).t()
        return out.view(*parts[MAIN].shape[:-3], width, rows)

    def fp4(self, parts: Mapping[str, Tensor]) -> Fp4:
        from .integers import nibbles

        return Fp4(nibbles(parts[MAIN]).flatten(-2), _exponents(parts[SCALES]))


def _exponents(stored: Tensor) -> Tensor:
    import torch

    return stored.view(torch.uint8).to(torch.int16) - BIAS


def _pairs_by_byte() -> Tensor:
    """(256, 2) bfloat16: the two values in each byte."""
    import torch

    values = torch.tensor(VALUES, dtype=torch.bfloat16)
    byte = torch.arange(256)
    return torch.stack((values[byte & 15], values[byte >> 4]), -1)


def layouts(config: dict[str, Any]) -> tuple[Layout, ...]:
    return (Mxfp4(),)
