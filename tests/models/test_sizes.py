"""The sums that placement and people go by, against what is really loaded."""

from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.engine.stage import Stage
from shoal.models.checkpoint import BUILTIN, Checkpoint, open_checkpoint
from shoal.models.published import Plain
from shoal.models.published.layout import Part
from shoal.models.safetensors_header import TensorInfo
from shoal.models.sizes import Counted, kv_bytes_per_token, model_sizes
from shoal.models.slice import load_slice
from shoal.units import Quant, Slice

from .families import EVERY, HYBRIDS

FolderOf = Callable[[str], Path]


def tensor(shape: tuple[int, ...], dtype: str = "F32", stored: int = 0) -> Plain:
    return Plain(shape, {"main": Part("x", TensorInfo("f", dtype, shape, stored, 8))})


def test_matrices_shrink_and_the_rest_does_not() -> None:
    some = Counted.of([tensor((10, 64)), tensor((3, 5, 33)), tensor((7,)), tensor(())])
    assert some.numbers == 640 + 495 + 8
    assert some.bytes_as("none", 2) == 2 * some.numbers
    assert some.bytes_as("int8", 2) == 640 + 495 + 4 * (10 + 15) + 2 * 8
    assert some.bytes_as("int4", 2) == 17 * (2 * 10 + 2 * 15) + 4 * (10 + 15) + 2 * 8


def test_four_bits_are_four_and_a_quarter_and_a_scale_for_each_row() -> None:
    assert Counted.of([tensor((100, 4096))]).bytes_as("int4", 2) == 100 * (4096 * 4.25 / 8 + 4)


def test_what_only_another_engine_reads_stays_as_it_is() -> None:
    some = Counted.of([tensor((10, 64), "ggml 12", stored=360)])
    assert some.numbers == 640
    quants: tuple[Quant, ...] = ("none", "int8", "int4")
    assert [some.bytes_as(quant, 4) for quant in quants] == [360, 360, 360]


@pytest.mark.parametrize("family", EVERY)
def test_floats_take_what_their_files_hold(folder_of: FolderOf, family: str) -> None:
    checkpoint = open_checkpoint(str(folder_of(family)))
    sizes = model_sizes(checkpoint, "none")
    assert list(sizes.layers) == checkpoint.layer_bytes
    assert (
        sizes.whole == checkpoint.slice_bytes(checkpoint.whole) == 4 * checkpoint.counts.parameters
    )
    assert sizes.embedding == checkpoint.slice_bytes(Slice(0, 1)) - checkpoint.layer_bytes[0]
    assert sizes.head == checkpoint.slice_bytes(Slice(3, 4)) - checkpoint.layer_bytes[3]
    assert model_sizes(checkpoint, "none", "bf16").whole * 2 == sizes.whole


@pytest.mark.parametrize("case", ["kimi_k2-int4", "qwen3-fp8", "gpt_oss-mxfp4"])
def test_a_quantised_checkpoint_takes_what_the_floats_take_that_it_stands_for(
    pair_of: Callable[[str], tuple[Checkpoint, Checkpoint]], case: str
) -> None:
    quantised, plain = pair_of(case)
    quants: tuple[Quant, ...] = ("none", "int8", "int4")
    for quant in quants:
        assert model_sizes(quantised, quant) == model_sizes(plain, quant)


def test_a_tied_head_becomes_a_matrix_of_its_own(folder_of: FolderOf) -> None:
    checkpoint = open_checkpoint(str(folder_of("llama-tied")))
    floats, int4 = model_sizes(checkpoint, "none"), model_sizes(checkpoint, "int4")
    norm, rows, width = 64, 211, 64
    assert floats.tied
    assert floats.head == floats.embedding + norm * 4
    assert not int4.tied
    assert int4.embedding == floats.embedding
    assert int4.head == rows * (width + 4) + norm * 4  # 8 bits whatever the kind
    assert int4.whole == sum(int4.layers) + int4.embedding + int4.head


def test_the_cache_holds_keys_and_values_or_latents() -> None:
    config = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64}
    assert kv_bytes_per_token(config, 2, exact=False) == 2 * 2 * 8 * 2
    assert kv_bytes_per_token(config, 2, exact=True) == 2 * 2 * (8 * 2 + 4)
    latent = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
    assert kv_bytes_per_token(latent, 2, exact=False) == 576 * 2
    assert kv_bytes_per_token(latent, 2, exact=True) == 576 * 2 + 2 * 4


@pytest.mark.parametrize("family", HYBRIDS)
def test_only_layers_that_look_back_add_to_the_cache(folder_of: FolderOf, family: str) -> None:
    checkpoint = open_checkpoint(str(folder_of(family)))
    sizes = model_sizes(checkpoint, "none")
    stage = Stage(load_slice(checkpoint, checkpoint.whole))
    assert sizes.kv_layers == (4 if family == "falcon_h1" else 1)
    assert sizes.cache_per_token == stage.kv_bytes_per_token


@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
def test_the_sums_are_what_a_loaded_model_takes(quant: Quant) -> None:
    checkpoint = open_checkpoint(BUILTIN)
    taken = load_slice(checkpoint, checkpoint.whole, quant=quant).nbytes
    assert taken == pytest.approx(model_sizes(checkpoint, quant).whole, rel=0.03)


def test_weights_that_are_computed_with_in_floats_keep_their_steps_in_floats() -> None:
    some = Counted.of([tensor((10, 64)), tensor((7,))])
    assert some.bytes_as("w8", 2) == 640 + 10 * 2 + 7 * 2
    assert some.bytes_as("w4", 2) == 320 + 10 * 2 * (2 + 2) + 7 * 2
