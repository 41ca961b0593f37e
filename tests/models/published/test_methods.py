"""What a `quantization_config` may say, and what becomes of one that says anything else."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import UnsupportedModel
from shoal.models.published import layouts_of
from shoal.models.published.fp8 import ScaledBytes, ScaledIntegers
from shoal.models.published.methods import METHODS, architecture

from .writers import CASES, float_config, gptq_config, int4_config


def layouts(quantization: Any) -> Any:
    return layouts_of("some/model", {"model_type": "llama", "quantization_config": quantization})


@pytest.mark.parametrize("case", CASES)
def test_every_method_that_is_read_announces_a_layout(case: str) -> None:
    assert len(layouts(CASES[case].quantization)) == 1


@pytest.mark.parametrize("nothing", [None, {}])
def test_a_checkpoint_in_floats_has_none(nothing: Any) -> None:
    assert layouts(nothing) == ()


def test_what_is_not_read_is_named_with_a_way_out() -> None:
    with pytest.raises(UnsupportedModel, match=r"some/model .* \(bitsandbytes\)") as refusal:
        layouts({"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert "--quant int8" in refusal.value.hint
    assert "gptq" in refusal.value.hint


@pytest.mark.parametrize(
    "quantization",
    [
        7,
        "fp8",
        ["fp8"],
        {"bits": 4},
        {"quant_method": ["gptq"]},
        {"quant_method": "fp8", "weight_block_size": [0, 128]},
        {"quant_method": "fp8", "weight_block_size": [128]},
        {"quant_method": "fp8", "weight_block_size": [1 << 70, 128]},
        {"quant_method": "fp8", "weight_block_size": "128"},
        gptq_config(bits=3),
        gptq_config(bits=True),
        gptq_config(group_size=-2),
        gptq_config(group_size=1e9),
        gptq_config(checkpoint_format="marlin"),
        {"quant_method": "awq", "version": "gemv"},
        {"quant_method": "awq", "bits": 8},
        {"quant_method": "compressed-tensors"},
        {"quant_method": "compressed-tensors", "config_groups": {"W4A16": ["Linear"]}},
        int4_config(num_bits=3),
        int4_config(strategy="tensor"),
        int4_config(type="float"),
        {**int4_config(), "format": "nvfp4-pack-quantized"},
        {**int4_config(), "format": "marlin-24"},
        {**int4_config(), "sparsity_config": {"format": "sparse-24-bitmask"}},
        float_config(type="int", symmetric=False),
    ],
)
def test_what_it_cannot_be_is_refused(quantization: Any) -> None:
    with pytest.raises(UnsupportedModel):
        layouts(quantization)


def test_groups_of_one_format_must_agree_and_those_of_two_need_not() -> None:
    int4, floats = int4_config(), float_config(strategy="channel")
    both = {**int4, "config_groups": {"a": {**group(int4)}, "b": {**group(int4, group_size=64)}}}
    with pytest.raises(UnsupportedModel, match="differ in bits or group size"):
        layouts(both)
    mixed = {
        "a": {**group(int4), "format": "pack-quantized"},
        "b": {**group(floats), "format": "float-quantized"},
        "c": {**group(floats), "format": "float-quantized"},
        "d": {"weights": None},
    }
    found = layouts({**int4, "config_groups": mixed, "format": "mixed-precision"})
    assert [layout.title for layout in found] == ["INT4 (pack-quantized)", "FP8"]


def group(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    held: dict[str, Any] = config["config_groups"]["group_0"]
    return {**held, "weights": {**held["weights"], **changes}}


def test_one_byte_a_weight_is_a_float_or_an_integer() -> None:
    assert (
        type(layouts(float_config(strategy="block", block_structure=[128, 128]))[0]) is ScaledBytes
    )
    whole = {**float_config(type="int", strategy="channel"), "format": "naive-quantized"}
    assert type(layouts(whole)[0]) is ScaledIntegers


def test_the_older_name_of_the_settings_counts_and_neither_is_architecture() -> None:
    config = {"model_type": "llama", "compression_config": int4_config()}
    assert len(layouts_of("x", config)) == 1
    assert architecture({**config, "quantization_config": {}}) == {"model_type": "llama"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
KNOWN = ("bits", "group_size", "weight_block_size", "config_groups", "format", "version")


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(sorted(METHODS)), st.dictionaries(st.sampled_from(KNOWN), JSON))
def test_anything_is_read_or_refused(method: str, said: dict[str, Any]) -> None:
    with suppress(UnsupportedModel):
        assert isinstance(layouts({"quant_method": method, **said}), tuple)
