"""Checkpoints in each published layout against the floats that they stand for, bit by bit."""

from collections.abc import Callable

import pytest
import torch

from shoal.engine.schedule import make_prompts, make_stages, run_schedule
from shoal.models.checkpoint import Checkpoint
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
