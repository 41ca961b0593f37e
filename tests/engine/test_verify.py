"""A draft never changes what is said, only how many passes it takes."""

import random
from collections.abc import Sequence

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engine.request import Sampled, Sampling
from shoal.engine.sampling import SamplerState, verify

VOCABULARY, LENGTH = 7, 20  # few tokens, so that wild guesses are right now and then

samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.5, 1.5]),
    top_p=st.sampled_from([0.7, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.4]),
    presence_penalty=st.sampled_from([0.0, 0.8]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    logprobs=st.sampled_from([-1, 2]),
    stop_ids=st.sampled_from([(), (3,)]),
    max_tokens=st.sampled_from([5, LENGTH]),
    seed=st.integers(0, 99),
)


def logits_after(ids: Sequence[int]) -> torch.Tensor:
    """What a model that looks at the last three tokens says."""
    chance = random.Random(repr(list(ids[-3:])))
    return torch.tensor([2 * chance.gauss(0, 1) for _ in range(VOCABULARY)])


def decode(sampling: Sampling, prompt: Sequence[int], guesses: random.Random) -> list[Sampled]:
    """A generation with random drafts; its neighbour in the batch shall not disturb it."""
    state, ids, said = SamplerState(sampling, prompt), list(prompt), list[Sampled]()
    while not (said and said[-1].finish):
        draft = [guesses.randrange(VOCABULARY) for _ in range(guesses.randrange(4))]
        lines = [logits_after([*ids, *draft[:at]]) for at in range(1 + len(draft))]
        other = SamplerState(Sampling(temperature=0), ())
        logits = torch.stack([*lines, torch.ones(VOCABULARY)])
        chosen, beside = verify(logits, [state, other], [draft, ()])
        assert len(beside) == 1
        assert 1 <= len(chosen) <= 1 + len(draft)
        said += chosen
        ids += [one.token for one in chosen]
    return said


class NoGuesses(random.Random):
    def randrange(self, *_: object) -> int:  # type: ignore[override]
        return 0


@settings(max_examples=60, deadline=None)
@given(samplings, st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=4), st.integers())
def test_the_tokens_their_logprobs_and_the_end_are_those_without_drafts(
    sampling: Sampling, prompt: list[int], seed: int
) -> None:
    assert decode(sampling, prompt, random.Random(seed)) == decode(sampling, prompt, NoGuesses())


def test_nothing_after_a_stop_token_is_chosen() -> None:
    logits = torch.eye(4)[[1, 2, 3]]
    state = SamplerState(Sampling(temperature=0, stop_ids=(2,)), ())
    (chosen,) = verify(logits, [state], [(1, 2)])
    assert [(one.token, one.finish) for one in chosen] == [(1, ""), (2, "stop")]
    assert state.position == 2
