"""llama.cpp's own `/completion`: token ids in and out, every sampling setting there is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from ..request import MAX_LOGPROBS, Ending, Grammar, Sampled, Sampling
from .dialect import (
    MORE,
    OPENAI,
    SEED_MASK,
    Dialect,
    Job,
    Json,
    Piece,
    Reader,
    check,
    ids_of,
    logprob,
)
from .retokenise import Retokeniser

SAMPLERS = ("penalties", "temperature", "top_k", "top_p", "min_p")  # in the order of our sampler


class LlamaDialect(Dialect):
    """Its presence and frequency penalties look at the prompt too; ours at the output only."""

    name = "llama.cpp server, token ids"
    path = "completion"
    settings = OPENAI | MORE | {"grammar"}

    def __init__(self, retokeniser: Retokeniser, eos_ids: Iterable[int]) -> None:
        self._retokeniser, self._eos_ids = retokeniser, frozenset(eos_ids)

    def refuses(self, sampling: Sampling) -> str:
        return _refuses_grammar(sampling.grammar) or super().refuses(sampling)

    def body(self, job: Job) -> dict[str, Any]:
        asked = job.sampling
        return {
            **_grammar(asked.grammar),
            "prompt": job.ids,
            "n_predict": job.room,
            "stream": True,
            "return_tokens": True,
            "cache_prompt": True,
            "samplers": SAMPLERS,
            "temperature": asked.temperature,
            "top_k": asked.top_k,
            "top_p": asked.top_p,
            "min_p": asked.min_p,
            "repeat_penalty": asked.repetition_penalty,
            "repeat_last_n": len(job.ids) + job.room,
            "presence_penalty": asked.presence_penalty,
            "frequency_penalty": asked.frequency_penalty,
            "seed": asked.seed & SEED_MASK,
            "logit_bias": [[token, bias] for token, bias in asked.logit_bias.items()],
            "n_probs": max(1, asked.logprobs) if asked.logprobs >= 0 else 0,
            "ignore_eos": self._eos_ids.isdisjoint(asked.stop_ids),
        }

    def reader(self) -> Reader:
        return LlamaReader(self._retokeniser)


def _refuses_grammar(asked: Grammar | None) -> str:
    """A stranger's schema may be anything."""
    if asked is None or asked.kind == "json_object":
        return ""
    if asked.kind == "tools":
        return "the engine behind this node (llama.cpp server) cannot be held to calls of tools"
    try:
        msgspec.json.decode(asked.text, type=dict[str, Any])
    except (ValueError, RecursionError) as error:
        return f"the schema is no JSON object: {error}"
    return ""


def _grammar(asked: Grammar | None) -> dict[str, Any]:
    """Its own way from a schema to a grammar: JSON of a schema, or any object."""
    if asked is None:
        return {}
    schema = asked.text if asked.kind == "json_schema" else '{"type": "object"}'
    return {"json_schema": msgspec.Raw(schema.encode())}


class LlamaReader(Reader):
    """A character that is cut over several tokens is told with the last of them alone: the count
    shows that some are missing, the text which ids write it.
    """

    def __init__(self, retokeniser: Retokeniser) -> None:
        self._retokeniser = retokeniser
        self._predicted = 0

    def read(self, event: Json) -> Piece:
        check(event)
        ids, text = ids_of(event["tokens"]), event["content"]
        made = int(event["tokens_predicted"]) - self._predicted
        self._predicted += made
        if made > len(ids) and text:
            ids = self._retokeniser.ids(text)
        tokens = [Sampled(token) for token in ids]
        if tokens and (told := event.get("completion_probabilities")):
            tokens[-1] = _with_logprobs(tokens[-1].token, told[-1])
        finish: Ending = ""
        if event["stop"]:
            finish = "length" if event.get("stop_type") == "limit" else "stop"
        return Piece(tuple(tokens), finish)


def _with_logprobs(token: int, told: Json) -> Sampled:
    best = [logprob(other["id"], other["logprob"]) for other in told["top_logprobs"][:MAX_LOGPROBS]]
    return Sampled(token, "", logprob(token, told["logprob"]).logprob, tuple(best))
