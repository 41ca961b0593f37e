"""Each layout alone: against transformers' own readers, at the edges, and with lies in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from shoal.errors import UnsupportedModel
from shoal.models.published.awq import Awq
from shoal.models.published.compressed import PackedIntegers
from shoal.models.published.fp8 import ScaledBytes
from shoal.models.published.gptq import Gptq
from shoal.models.published.layout import Layout, plain_tensors
from shoal.models.published.mxfp4 import VALUES, Mxfp4
from shoal.models.published.view import PlainTensors
from shoal.models.safetensors_header import read_header

from . import writers


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def opened(folder: Path, stored: Mapping[str, Tensor], *layouts: Layout) -> PlainTensors:
    path = folder / "model.safetensors"
    save_file({f"x{ending}": tensor.contiguous() for ending, tensor in stored.items()}, path)
    return PlainTensors(folder, plain_tensors(read_header(path), layouts))


def read(folder: Path, stored: Mapping[str, Tensor], *layouts: Layout) -> Tensor:
    tensors = opened(folder, stored, *layouts)
    (name,) = plain_tensors(read_header(folder / "model.safetensors"), layouts)
    return tensors.floats(name)


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(1, 70), st.integers(1, 70)),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_blocks_are_cut_off_at_the_edges(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, int], block: tuple[int, int]
) -> None:
    stored, values = writers.fp8_blocks(noise(*shape), block)
    folder = tmp_path_factory.mktemp("fp8")
    assert torch.equal(read(folder, stored, ScaledBytes(block)), values)


def test_a_weight_of_deepseeks_blocks_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    stored, _ = writers.fp8_blocks(noise(256, 384), (128, 128))
    expected = Fp8Dequantize(None)._dequantize_one(
        stored[".weight"], stored[".weight_scale_inv"], torch.float32
    )
    assert torch.equal(read(tmp_path, stored, ScaledBytes((128, 128))), expected)


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.uint8])
def test_scales_may_be_stored_as_exponents(tmp_path: Path, dtype: torch.dtype) -> None:
    exponents = torch.tensor([[120, 127], [130, 125]], dtype=torch.uint8)
    codes = noise(4, 6).to(torch.float8_e4m3fn)
    stored = {".weight": codes, ".weight_scale_inv": exponents.view(dtype)}
    factor = (exponents.float() - 127).exp2().repeat_interleave(2, 0).repeat_interleave(3, 1)
    assert torch.equal(read(tmp_path, stored, ScaledBytes((2, 3))), codes.float() * factor)


def test_gpt_oss_experts_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(3)
    blocks = torch.randint(0, 256, (3, 10, 4, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(100, 150, (3, 10, 4), generator=generator, dtype=torch.uint8)
    found = read(tmp_path, {"_blocks": blocks, "_scales": scales}, Mxfp4())
    assert found.shape == (3, 128, 10)
    assert torch.equal(found, convert_moe_packed_tensors(blocks, scales))


def test_the_codes_of_mxfp4_make_up_the_weight(tmp_path: Path) -> None:
    stored, values = writers.mxfp4(noise(2, 64, 5))
    tensors = opened(tmp_path, stored, Mxfp4())
    parts = tensors.fp4("x")
    assert tensors.int4("x") is None
    assert parts is not None
    assert (parts.codes.shape, parts.exponents.shape) == ((2, 5, 64), (2, 5, 2))
    factor = parts.exponents.float().exp2().repeat_interleave(32, -1)
    made = torch.tensor(VALUES)[parts.codes.long()] * factor
    assert torch.equal(made.transpose(1, 2), values)


INTEGERS: dict[str, tuple[Layout, Any]] = {
    "pack-quantized": (PackedIntegers(4, 32), lambda w: writers.pack_quantized(w, 32)),
    "with zero points": (
        PackedIntegers(4, 32, symmetric=False),
        lambda w: writers.pack_quantized(w, 32, symmetric=False),
    ),
    "gptq": (Gptq(4, 32), lambda w: writers.gptq(w, 32, symmetric=False)),
    "gptq of one group": (Gptq(4, -1), lambda w: writers.gptq(w, w.shape[1], symmetric=True)),
    "awq": (Awq(32), lambda w: writers.awq(w, 32)),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_the_codes_of_integers_make_up_the_weight(tmp_path: Path, name: str) -> None:
    layout, packer = INTEGERS[name]
    stored, values = packer(noise(24, 96))
    tensors = opened(tmp_path, stored, layout)
    parts = tensors.int4("x.weight")
    assert tensors.fp4("x.weight") is None
    assert parts is not None
    assert parts.codes.dtype == torch.int8
    assert -8 <= int(parts.codes.min()) <= int(parts.codes.max()) <= 7
    zeros = torch.zeros_like(parts.scales) if parts.zeros is None else parts.zeros
    spread = [each.float().repeat_interleave(parts.group, 1) for each in (zeros, parts.scales)]
    assert torch.equal((parts.codes - spread[0]) * spread[1], values)
    assert (parts.zeros is None) == (name in ("pack-quantized", "gptq of one group"))


def test_columns_out_of_order_and_eight_bits_are_no_plain_4_bit_groups(tmp_path: Path) -> None:
    stored, values = writers.gptq(noise(24, 96), 32, symmetric=True, desc_act=True)
    tensors = opened(tmp_path, stored, Gptq(4, 32))
    assert tensors.int4("x.weight") is None
    assert torch.equal(tensors.floats("x.weight"), values)
    stored, values = writers.pack_quantized(noise(24, 96), 32, bits=8)
    tensors = opened(tmp_path, stored, PackedIntegers(8, 32))
    assert tensors.int4("x.weight") is None
    assert torch.equal(tensors.floats("x.weight"), values)


def test_inputs_and_outputs_need_not_fill_their_last_word(tmp_path: Path) -> None:
    layout = PackedIntegers(4, 32, symmetric=False)
    for shuffled in (False, True):
        weight = noise(11, 77)
        stored, values = writers.pack_quantized(weight, 32, symmetric=False, shuffled=shuffled)
        assert torch.equal(read(tmp_path, stored, layout), values)


def test_version_1_of_gptq_borrows_over_the_codes_of_a_word(tmp_path: Path) -> None:
    """A zero point of 0 is stored as what is left when 1 is taken from each code of the word."""
    stored, _ = writers.gptq(noise(8, 32), 32, symmetric=True, version=2)
    zeros = torch.tensor([[0, 5, 0, 15, 1, 8, 0, 3]])
    stored[".qzeros"] = writers.words(zeros)
    second = read(tmp_path, stored, Gptq(4, 32, 2))
    stored[".qzeros"] -= 0x1111_1111
    assert torch.equal(read(tmp_path, stored, Gptq(4, 32, 1)), second)


def test_only_the_plain_ones_among_several_formats_stay_as_they_are(tmp_path: Path) -> None:
    stored = {**writers.fp8_rows(noise(4, 4))[0], ".bias": noise(4), ".k_scale": torch.ones(1)}
    opened(tmp_path, stored, ScaledBytes())
    plain = plain_tensors(read_header(tmp_path / "model.safetensors"), (ScaledBytes(),))
    assert {name: each.layout is None for name, each in plain.items()} == {
        "x.weight": False,
        "x.bias": True,
    }
    assert plain["x.weight"].stored_bytes == 16 + 16


FP8 = writers.fp8_rows(noise(24, 96))[0]
PACKED = writers.pack_quantized(noise(24, 96), 32, symmetric=False, shuffled=True)[0]
GPTQ = writers.gptq(noise(24, 96), 32, symmetric=True)[0]
AWQ = writers.awq(noise(24, 96), 32)[0]
MXFP4 = writers.mxfp4(noise(2, 64, 5))[0]
ZEROED = PackedIntegers(4, 32, symmetric=False)
WORDS = torch.zeros(3, 5, dtype=torch.int32)


@pytest.mark.parametrize(
    ("layout", "stored", "lies"),
    [
        (ScaledBytes(), FP8, {".weight_scale": None}),
        (ScaledBytes(), FP8, {".weight_scale": torch.ones(7, 1)}),
        (ScaledBytes((128, 128)), FP8, {".weight_scale": torch.ones(2, 1)}),
        (ScaledBytes(), FP8, {".weight_scale": torch.ones(24, 1, dtype=torch.int64)}),
        (ScaledBytes(), FP8, {".weight": torch.zeros(24).to(torch.float8_e4m3fn)}),
        (ZEROED, PACKED, {".weight_shape": None}),
        (ZEROED, PACKED, {".weight_shape": torch.tensor([24, 1 << 40])}),
        (ZEROED, PACKED, {".weight_shape": torch.tensor([-24, -96])}),
        (ZEROED, PACKED, {".weight_shape": torch.tensor(3)}),
        (ZEROED, PACKED, {".weight_zero_point": None}),
        (ZEROED, PACKED, {".weight_zero_point": WORDS}),
        (ZEROED, PACKED, {".weight_scale": torch.ones(24, 4)}),
        (ZEROED, PACKED, {".weight_g_idx": torch.full((96,), 3, dtype=torch.int32)}),
        (ZEROED, PACKED, {".weight_g_idx": torch.full((96,), -7, dtype=torch.int32)}),
        (ZEROED, PACKED, {".weight_g_idx": torch.zeros(5, dtype=torch.int32)}),
        (PackedIntegers(4, 32), PACKED, {}),
        (PackedIntegers(4, 64, symmetric=False), PACKED, {}),
        (Gptq(4, 32), GPTQ, {".scales": None}),
        (Gptq(4, 32), GPTQ, {".qzeros": WORDS}),
        (Gptq(4, 32), GPTQ, {".scales": torch.ones(3, 23)}),
        (Gptq(4, 32), GPTQ, {".g_idx": torch.full((96,), 99, dtype=torch.int32)}),
        (Gptq(4, 32), GPTQ, {".g_idx": torch.zeros(95, dtype=torch.int32)}),
        (Gptq(8, 32), GPTQ, {}),
        (Gptq(4, 32), GPTQ, {".qweight": torch.zeros(12, dtype=torch.int32)}),
        (Awq(32), AWQ, {".qzeros": WORDS}),
        (Awq(32), AWQ, {".scales": torch.ones(3, 25)}),
        (Awq(64), AWQ, {}),
        (Mxfp4(), MXFP4, {"_scales": torch.zeros(2, 5, 3, dtype=torch.uint8)}),
        (Mxfp4(), MXFP4, {"_scales": None}),
        (Mxfp4(), MXFP4, {"_blocks": torch.zeros(5, 16, dtype=torch.uint8)}),
        (Mxfp4(), MXFP4, {"_blocks": torch.zeros(2, 5, 2, 15, dtype=torch.uint8)}),
    ],
)
def test_parts_that_contradict_each_other_are_refused(
    tmp_path: Path, layout: Layout, stored: dict[str, Tensor], lies: dict[str, Tensor | None]
) -> None:
    told = {name: tensor for name, tensor in (stored | lies).items() if tensor is not None}
    with pytest.raises(UnsupportedModel):
        read(tmp_path, told, layout)


def test_a_weight_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"x\.weight is stored twice"):
        read(tmp_path, {**GPTQ, ".weight": noise(24, 96)}, Gptq(4, 32))
