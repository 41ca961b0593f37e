"""Invariant 1, for every family: stages compute, bit for bit, what the unsplit model computes."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from shoal.engine.prove import CUTS, TOLERANCE
from shoal.engine.request import Sampling
from shoal.engine.rows import Row
from shoal.engine.sampling import SamplerState
from shoal.engine.schedule import (
    PAGE_SIZE,
    SCHEDULE,
    Answer,
    make_prompts,
    make_stages,
    plain_logits,
    run_schedule,
)
from shoal.engine.stage import Stage
from shoal.models.checkpoint import Checkpoint
from shoal.units import SessionId

from ..models.families import EVERY, FAMILIES

Tiny = Callable[[str], tuple[Checkpoint, Any]]
PROMPTS = make_prompts(211)


def same_bits(some: Sequence[Answer], others: Sequence[Answer]) -> bool:
    pairs = zip(some, others, strict=True)
    return all(torch.equal(one.logits, other.logits) for one, other in pairs)


def greedy(stages: Sequence[Stage], prompt: Sequence[int], tokens: int) -> list[int]:
    """Generate through the stages' own `step`, hidden states travelling as bytes."""
    pages = range(-(-(len(prompt) + tokens) // PAGE_SIZE))
    state = SamplerState(Sampling(temperature=0, max_tokens=tokens), prompt)
    at, ids = 0, list(prompt)
    answer: list[int] = []
    while len(answer) < tokens:
        row = Row(SessionId("s"), at, pages, len(ids), ids, sampler=state)
        for stage in stages[:-1]:
            result = stage.step([row])
            wire = stage.hidden_to_wire(result, [row], [0])
            hidden = stage.hidden_from_wire(bytes(wire), row.count)
            row = Row(row.session, row.start, pages, row.count, hidden=hidden, sampler=state)
        ((chosen,),) = stages[-1].step([row]).sampled
        at, ids = at + len(ids), [chosen.token]
        answer.append(chosen.token)
    return answer


def plain_greedy(model: Any, prompt: Sequence[int], tokens: int) -> list[int]:
    text = list(prompt)
    for _ in range(tokens):
        text.append(int(plain_logits(model, text)[-1].argmax()))
    return text[len(prompt) :]


def test_the_schedule_joins_leaves_mixes_and_cuts_prompts() -> None:
    present = [{session for session, _, _ in step} for step in SCHEDULE]
    assert present[0] < present[2]
    assert present[2] > present[3]
    assert any({stop - start == 1 for _, start, stop in step} == {True, False} for step in SCHEDULE)
    assert any(start > 0 and stop - start > 1 for step in SCHEDULE for _, start, stop in step)


@pytest.mark.parametrize("family", EVERY)
def test_stages_compute_the_whole_models_bits_and_transformers_numbers(
    tiny: Tiny, family: str
) -> None:
    checkpoint, reference = tiny(family)
    whole = run_schedule(make_stages(checkpoint, ()), PROMPTS)
    plain = [plain_logits(reference, prompt) for prompt in PROMPTS]
    for answer in whole:
        expected = plain[answer.session][answer.position]
        assert (answer.logits - expected).abs().max() <= TOLERANCE * expected.abs().max()
    for cuts in CUTS:
        stages = make_stages(checkpoint, cuts)
        assert len(stages) == len(cuts) + 1
        assert same_bits(whole, run_schedule(stages, PROMPTS))


@pytest.mark.parametrize("family", EVERY)
def test_greedy_text_is_that_of_transformers(tiny: Tiny, family: str) -> None:
    checkpoint, reference = tiny(family)
    expected = plain_greedy(reference, PROMPTS[0], 6)
    for cuts in ((), *CUTS):
        assert greedy(make_stages(checkpoint, cuts), PROMPTS[0], 6) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_stages_compute_the_whole_models_bits(tiny: Tiny, family: str) -> None:
    checkpoint, _ = tiny(family)
    whole = run_schedule(make_stages(checkpoint, (), "int8"), PROMPTS)
    assert same_bits(whole, run_schedule(make_stages(checkpoint, (0.5,), "int8"), PROMPTS))


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", "bf16"), ("gemma2", "f16"), ("deepseek_v3", "bf16"), ("qwen3_next", "bf16")],
)
def test_short_floats_split_bit_for_bit_too(tiny: Tiny, family: str, dtype: str) -> None:
    checkpoint, _ = tiny(family)
    whole = run_schedule(make_stages(checkpoint, (), dtype=dtype), PROMPTS)
    assert same_bits(whole, run_schedule(make_stages(checkpoint, (0.5,), dtype=dtype), PROMPTS))
