"""In the exact classes a draft does not move one bit of what is chosen, nor of the cache."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.engine.request import Sampled, Sampling
from shoal.engine.rows import Row
from shoal.engine.sampling import SamplerState
from shoal.engine.schedule import PAGE_SIZE, make_stages
from shoal.engine.stage import Stage
from shoal.models.checkpoint import Checkpoint
from shoal.units import SessionId

Tiny = Callable[[str], tuple[Checkpoint, Any]]
PROMPT = [5, 17, 99, 3, 42]
TOKENS = 20


def generate(
    stages: Sequence[Stage], sampling: Sampling, guess: Callable[[int], list[int]]
) -> list[Sampled]:
    """`guess` is told how many tokens there are, and says the ones that follow."""
    pages = range(-(-(len(PROMPT) + TOKENS + 8) // PAGE_SIZE))
    state, said = SamplerState(sampling, PROMPT), list[Sampled]()
    at, ids, draft = 0, PROMPT, list[int]()
    while not (said and said[-1].finish):
        row = Row(SessionId("s"), at, pages, len(ids), ids, sampler=state, draft=draft)
        for stage in stages[:-1]:
            hidden = stage.step([row]).hidden
            row = Row(row.session, at, pages, len(ids), None, hidden, state, draft)
        (chosen,) = stages[-1].step([row]).sampled
        said += chosen
        at = len(PROMPT) + len(said) - 1
        draft = guess(len(said))[: TOKENS - len(said)]
        ids = [said[-1].token, *draft]
    return said


samplings = st.sampled_from(
    [
        Sampling(temperature=0, max_tokens=TOKENS, logprobs=2),
        Sampling(temperature=0.9, seed=3, max_tokens=TOKENS, logprobs=0),
        Sampling(temperature=1.2, top_p=0.8, repetition_penalty=1.2, seed=8, max_tokens=TOKENS),
    ]
)


@pytest.mark.parametrize("family", ["llama", "mixtral", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_texts_and_logprobs_are_those_without_drafts_bit_for_bit(
    tiny: Tiny, family: str, quant: Literal["int8", "int4"]
) -> None:
    checkpoint, _ = tiny(family)
    whole, halves = (make_stages(checkpoint, cuts, quant) for cuts in ((), (0.5,)))

    @settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
    @given(samplings, st.randoms(use_true_random=False))
    def check(sampling: Sampling, chance: Any) -> None:
        plain = generate(whole, sampling, lambda told: [])
        ids = [one.token for one in plain]

        def guess(told: int) -> list[int]:
            return [
                token if chance.random() < 0.7 else chance.randrange(checkpoint.vocab_size)
                for token in ids[told : told + chance.randrange(7)]
            ]

        assert generate(halves, sampling, guess) == plain

    with torch.inference_mode():
        check()
