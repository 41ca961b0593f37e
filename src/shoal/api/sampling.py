"""From the words of a request to the sampler's settings. Pure: chance comes in as `seed`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import msgspec

from ..engine.request import Grammar, Sampling
from ..errors import InvalidRequest, PromptTooLong
from ..models.text import Tokenizer
from .backend import ServedModel
from .bodies import GenerationBody

SEED_MASK = (1 << 63) - 1


def sampling_of(
    body: GenerationBody,
    tokenizer: Tokenizer,
    max_tokens: int,
    seed: int,
    grammar: Grammar | None = None,
) -> Sampling:
    """The settings of the first choice; `seed` is used where the client gave none.

    Raises InvalidRequest that names the parameter out of range.
    """
    given = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": None if body.top_k is None else max(body.top_k, 0),
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
    }
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if body.logit_bias:
        settings["logit_bias"] = _biases(body.logit_bias, tokenizer)
    try:
        return Sampling(
            seed=(seed if body.seed is None else body.seed) & SEED_MASK,
            logprobs=body.wanted_logprobs,
            stop_ids=_stop_ids(body, tokenizer),
            max_tokens=max_tokens,
            grammar=grammar,
            **settings,
        )
    except ValueError as error:
        param = str(error).partition(" ")[0]
        raise InvalidRequest(str(error), param=param) from None


def for_choice(sampling: Sampling, index: int) -> Sampling:
    """The same request with chance of its own: choice 0 has the seed as given."""
    if index == 0:
        return sampling
    return msgspec.structs.replace(sampling, seed=(sampling.seed + index) & SEED_MASK)


def room_for_answer(model: ServedModel, prompt_tokens: int, wanted: int | None, usual: int) -> int:
    """How many tokens may be generated. Raises PromptTooLong when there is room for none.

    A wish beyond the context is cut to it: such an answer ends with finish_reason "length".
    """
    room = model.context_length - prompt_tokens
    if room < 1:
        raise PromptTooLong(
            f"the prompt has {prompt_tokens} tokens, but {model.id} allows at most "
            f"{model.context_length - 1} (its context is {model.context_length} tokens, "
            "one of them for the answer)",
            hint="shorten the prompt",
        )
    return min(wanted or usual, room)


def check_token_ids(ids: Collection[int], tokenizer: Tokenizer, param: str) -> None:
    """Raises InvalidRequest for an id that the model has no embedding for."""
    known = tokenizer.vocab_size
    if max(ids, default=0) >= known:
        raise InvalidRequest(
            f"token id {max(ids)} is outside the vocabulary (0 to {known - 1})", param=param
        )


def _stop_ids(body: GenerationBody, tokenizer: Tokenizer) -> tuple[int, ...]:
    ends = () if body.ignore_eos else tokenizer.eos_ids
    return tuple(dict.fromkeys((*ends, *(body.stop_token_ids or ()))))


def _biases(raw: dict[str, Any], tokenizer: Tokenizer) -> dict[int, float]:
    biases: dict[int, float] = {}
    for key, bias in raw.items():
        if not key.isdecimal() or isinstance(bias, bool) or not isinstance(bias, int | float):
            raise InvalidRequest(
                "logit_bias maps token ids, in decimal, to numbers", param="logit_bias"
            )
        biases[int(key[:20])] = float(bias)
    check_token_ids(biases, tokenizer, "logit_bias")
    return biases
