"""Checkpoints in each published layout against the floats that they stand for, bit by bit."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shoal.engine.schedule import make_prompts, make_stages, run_schedule
from shoal.errors import UnsupportedModel
from shoal.models.checkpoint import Checkpoint, open_checkpoint
from shoal.models.slice import load_slice
from shoal.units import Slice

from ..reads import places, record_reads
from .writers import CASES

PairOf = Callable[[str], tuple[Checkpoint, Checkpoint]]
PROMPTS = make_prompts(211)
DTYPES = ("f32", "bf16")


def logits(checkpoint: Checkpoint, *cuts: float) -> torch.Tensor:
    answers = run_schedule(make_stages(checkpoint, cuts), PROMPTS)
    return torch.stack([answer.logits for answer in answers])


@pytest.mark.parametrize("case", CASES)
def test_the_logits_are_those_of_the_floats_whole_and_split(pair_of: PairOf, case: str) -> None:
    quantised, plain = pair_of(case)
    expected = logits(plain)
    assert expected.isfinite().all()
    assert torch.equal(logits(quantised), expected)
    assert torch.equal(logits(quantised, 0.5), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_a_slice_holds_the_same_weights_in_every_type(
    pair_of: PairOf, case: str, dtype: str
) -> None:
    quantised, plain = (load_slice(each, Slice(1, 3), dtype).model for each in pair_of(case))
    expected = plain.state_dict()
    assert quantised.state_dict().keys() == expected.keys()
    for name, tensor in quantised.state_dict().items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("case", CASES)
def test_headers_tell_names_and_shapes(pair_of: PairOf, case: str) -> None:
    quantised, plain = pair_of(case)
    shapes = {name: each.shape for name, each in quantised.plain(quantised.whole).items()}
    assert shapes == {name: info.shape for name, info in plain.tensors.items()}
    assert quantised.slice_bytes(quantised.whole) < plain.slice_bytes(plain.whole)


@pytest.mark.parametrize("case", ["deepseek_v3-fp8", "gpt_oss-mxfp4", "qwen2-gptq"])
def test_only_the_slices_tensors_are_read(
    pair_of: PairOf, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantised, _ = pair_of(case)
    asked = record_reads(monkeypatch)
    load_slice(quantised, Slice(1, 2))
    assert sorted(asked) == places(quantised.own(Slice(1, 2)).values())
    assert 0 < len(asked) < len(quantised.tensors)


def test_a_lie_that_only_the_contents_tell_is_refused_with_its_name(
    pair_of: PairOf, tmp_path: Path
) -> None:
    quantised, _ = pair_of("qwen2-gptq")
    folder = Path(shutil.copytree(quantised.folder, tmp_path / "lying"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.g_idx"][5] = 99
    save_file(tensors, folder / "model.safetensors")
    lying = open_checkpoint(str(folder))
    with pytest.raises(
        UnsupportedModel, match=r"1\.self_attn\.q_proj\.weight .* group beyond the 2"
    ):
        load_slice(lying, Slice(1, 2))
    load_slice(lying, Slice(2, 3))
