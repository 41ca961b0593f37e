import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engine.request import Sampled, Sampling
from shoal.engine.sampling import SamplerState, sample, uniform

VOCABULARY = 24

samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 1e-30, 0.3, 1.0, 2.5]),
    top_p=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    top_k=st.sampled_from([0, 1, 5, VOCABULARY, 99]),
    min_p=st.sampled_from([0.0, 0.1, 1.0]),
    repetition_penalty=st.sampled_from([0.01, 1.0, 1.3, 100.0]),
    presence_penalty=st.sampled_from([0.0, 1.5, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.7]),
    seed=st.integers(-(2**63), 2**63),
    logprobs=st.sampled_from([-1, 0, 3]),
    logit_bias=st.sampled_from([{}, {3: 4.0, 10**9: 100.0}]),
)
histories = st.lists(st.integers(0, 2 * VOCABULARY), max_size=8)
logit_rows = st.lists(
    st.floats(-(2.0**90), 2.0**90, width=32)
    | st.sampled_from([0.0, 1.0, 1.0000001, math.nan, math.inf, -math.inf]),
    min_size=VOCABULARY,
    max_size=VOCABULARY,
)


def random_logits(rows: int, seed: int = 0, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def one(logits: torch.Tensor, history: Sequence[int] = (), **wanted: Any) -> Sampled:
    """The choice for a single row; `history` is output."""
    return sample(logits.reshape(1, -1), [SamplerState(Sampling(**wanted), (), history)])[0]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(logit_rows, samplings, histories, histories), min_size=1, max_size=5))
def test_a_row_gets_the_same_token_alone_and_at_any_place_in_any_batch(
    cases: list[tuple[list[float], Sampling, list[int], list[int]]],
) -> None:
    logits = torch.tensor([row for row, *_ in cases])

    def states() -> list[SamplerState]:
        return [SamplerState(*rest) for _, *rest in cases]

    together = sample(logits, states())
    alone = [sample(logits[r : r + 1], [state])[0] for r, state in enumerate(states())]
    reversed_batch = sample(logits.flip(0), states()[::-1])[::-1]
    assert repr(together) == repr(alone) == repr(reversed_batch)


@settings(max_examples=30, deadline=None)
@given(samplings, histories, st.integers(0, 99))
def test_a_state_rebuilt_from_the_output_goes_on_with_the_same_tokens(
    sampling: Sampling, prompt: list[int], seed: int
) -> None:
    steps = random_logits(6, seed)
    undisturbed = SamplerState(sampling, prompt)
    tokens = [sample(row[None], [undisturbed])[0].token for row in steps]
    resumed = SamplerState(sampling, prompt, tokens[:3])
    assert [sample(row[None], [resumed])[0].token for row in steps[3:]] == tokens[3:]
    assert resumed.position == undisturbed.position == 6


@settings(max_examples=60, deadline=None)
@given(logit_rows, st.sampled_from([{"top_k": 1}, {"top_p": 0.0}, {"top_p": 1e-9}]), st.integers())
def test_filters_that_leave_one_token_leave_the_greedy_one(
    row: list[float], only_best: dict[str, Any], seed: int
) -> None:
    logits = torch.tensor(row)
    assert one(logits, seed=seed, **only_best).token == one(logits, temperature=0).token


def test_equal_best_logits_yield_the_lowest_id_with_and_without_logprobs() -> None:
    logits = torch.zeros(300)
    logits[[17, 40, 299]] = 5.0
    assert one(logits, temperature=0).token == 17
    assert one(logits, temperature=0, logprobs=1).token == 17
    assert [t.token for t in one(logits, temperature=0, logprobs=3).top] == [17, 40, 299]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_of_any_float_type_are_taken(dtype: torch.dtype) -> None:
    logits = torch.arange(20, dtype=dtype)
    assert one(logits, temperature=0).token == one(logits, top_k=1).token == 19


def test_draws_follow_the_softmax_with_temperature() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])
    draws = 4000
    states = [SamplerState(Sampling(temperature=1.7, seed=seed), ()) for seed in range(draws)]
    found = Counter(s.token for s in sample(logits.expand(draws, -1), states))
    expected = (torch.softmax(logits / 1.7, -1) * draws).tolist()
    chi_square = sum((found[i] - e) ** 2 / e for i, e in enumerate(expected))
    assert chi_square < 18.5  # 4 degrees of freedom: one in a thousand is worse


def test_draws_of_one_seed_at_many_positions_are_uniform() -> None:
    tenths = Counter(int(uniform(7, position) * 10) for position in range(5000))
    assert sum((tenths[i] - 500) ** 2 / 500 for i in range(10)) < 27.9  # 9 degrees, 0.1 %


def test_the_draw_of_a_seed_and_position_never_changes_between_releases() -> None:
    assert uniform(0, 0) == 0.8336885269740499
    assert uniform(-5, 3) == 0.4578540349636988


@pytest.mark.parametrize(
    ("wanted", "kept"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.6}, {0, 1}),  # probabilities .5 .25 .125 .125
        ({"top_p": 0.5}, {0}),
        ({"min_p": 0.4}, {0, 1}),
        ({"top_k": 3, "top_p": 0.8}, {0, 1}),  # of the three: 4/7, 2/7, 1/7
        ({"top_k": 3}, {0, 1, 2}),  # equal ones: the lower id stays
        ({}, {0, 1, 2, 3}),
    ],
)
def test_filters_keep_exactly_the_tokens_they_should(
    wanted: dict[str, Any], kept: set[int]
) -> None:
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    assert {one(logits, seed=seed, **wanted).token for seed in range(150)} == kept


@pytest.mark.parametrize(
    "penalty",
    [{"repetition_penalty": 2.0}, {"presence_penalty": 2.0}, {"frequency_penalty": 1.0}],
)
def test_penalties_reduce_repeats(penalty: dict[str, float]) -> None:
    def distinct(**wanted: Any) -> int:
        state = SamplerState(Sampling(seed=3, **wanted), ())
        logits = random_logits(1, seed=5)
        return len({sample(logits, [state])[0].token for _ in range(40)})

    assert distinct(**penalty) > distinct()


def test_the_prompt_counts_for_the_repetition_penalty_only() -> None:
    logits = torch.tensor([[3.0, 2.9, -1.0]])

    def token(**wanted: Any) -> int:
        return sample(logits, [SamplerState(Sampling(temperature=0, **wanted), [0, 0])])[0].token

    assert token(repetition_penalty=1.2) == 1
    assert token(presence_penalty=2.0, frequency_penalty=2.0) == 0


def test_the_repetition_penalty_moves_negative_logits_further_down() -> None:
    assert one(torch.tensor([-1.0, -1.5]), [0], temperature=0, repetition_penalty=2.0).token == 1


def test_the_frequency_penalty_counts_every_occurrence() -> None:
    logits = torch.tensor([2.0, 1.0])
    assert one(logits, [0, 0], temperature=0, frequency_penalty=0.4).token == 0
    assert one(logits, [0, 0, 0], temperature=0, frequency_penalty=0.4).token == 1


def test_a_bias_moves_the_choice_and_ids_beyond_the_vocabulary_are_passed_over() -> None:
    logits = torch.tensor([1.0, 0.0, 0.5])
    assert one(logits, temperature=0, logit_bias={1: 5.0, 3: 100.0, 10**12: 1.0}).token == 1
    assert one(logits, temperature=0, logit_bias={0: -100.0}).token == 2


def test_penalties_pass_over_history_ids_beyond_the_vocabulary() -> None:
    logits = torch.tensor([1.0, 0.0])
    wanted = {"repetition_penalty": 2.0, "frequency_penalty": 0.1}
    assert one(logits, [5, 10**9, 1], temperature=0, **wanted).token == 0


def test_logprobs_are_of_the_raw_logits_and_sum_to_one() -> None:
    logits = random_logits(1, vocabulary=6)[0]
    got = one(logits, [2], temperature=0.2, top_k=2, presence_penalty=1.0, logprobs=20)
    expected = torch.log_softmax(logits.double(), -1)
    assert got.logprob == pytest.approx(expected[got.token].item(), abs=1e-6)
    assert [t.token for t in got.top] == expected.argsort(descending=True).tolist()
    assert sum(np.exp(t.logprob) for t in got.top) == pytest.approx(1.0, abs=1e-6)


def test_logprobs_come_as_many_as_asked() -> None:
    logits = random_logits(1)[0]
    assert one(logits).logprob is None
    assert one(logits, logprobs=0).top == ()
    assert one(logits, logprobs=0).logprob is not None
    assert len(one(logits, temperature=0, logprobs=4).top) == 4


def test_a_session_ends_at_a_stop_token_or_at_its_length() -> None:
    logits = torch.tensor([0.0, 9.0])
    assert one(logits, temperature=0, max_tokens=2).finish == ""
    assert one(logits, [0], temperature=0, max_tokens=2).finish == "length"
    assert one(logits, temperature=0, max_tokens=2, stop_ids=(1,)).finish == "stop"
    assert one(logits, [0], temperature=0, max_tokens=2, stop_ids=(1,)).finish == "stop"


def test_a_row_that_is_not_finite_yields_a_token_and_harms_no_other() -> None:
    logits = random_logits(4)
    healthy = one(logits[0], temperature=0).token
    logits[1], logits[2], logits[3, 5] = float("nan"), float("-inf"), float("inf")
    logits[3, 2] = float("nan")
    for wanted in ({"temperature": 0.0}, {"seed": 3}, {"temperature": 0.0, "logprobs": 2}):
        states = [SamplerState(Sampling(**wanted), ()) for _ in range(4)]  # type: ignore[arg-type]
        tokens = [s.token for s in sample(logits, states)]
        assert tokens[3] == 5
        assert all(0 <= token < VOCABULARY for token in tokens)
        if wanted.get("temperature") == 0.0:
            assert tokens[:3] == [healthy, 0, 0]
