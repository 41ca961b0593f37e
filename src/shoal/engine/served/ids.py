"""OpenAI's `/v1/completions` with token ids both ways, as vLLM has it (`return_token_ids`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..request import MAX_LOGPROBS, Sampled
from .dialect import (
    MORE,
    OPENAI,
    Dialect,
    Job,
    Json,
    Piece,
    Reader,
    ids_of,
    logprob,
    openai_body,
    openai_choice,
    openai_finish,
)

NAMED = "token_id:"  # how vLLM writes a token in logprobs when told to


class IdsDialect(Dialect):
    path = "v1/completions"
    settings = OPENAI | MORE

    def __init__(self, kind: str, model: str, eos_ids: Iterable[int]) -> None:
        self.name = f"{kind}, token ids"
        self._model, self._eos_ids = model, frozenset(eos_ids)

    def body(self, job: Job) -> dict[str, Any]:
        asked = job.sampling
        body = {
            **openai_body(self._model, job),
            "prompt": job.ids,
            "return_token_ids": True,
            "min_p": asked.min_p,
            "repetition_penalty": asked.repetition_penalty,
            "stop_token_ids": list(asked.stop_ids),
            "ignore_eos": self._eos_ids.isdisjoint(asked.stop_ids),
        }
        if asked.top_k:
            body["top_k"] = asked.top_k
        if asked.logprobs >= 0:
            body |= {"logprobs": asked.logprobs, "return_tokens_as_token_ids": True}
        return body

    def reader(self) -> Reader:
        return IdsReader()


class IdsReader(Reader):
    def read(self, event: Json) -> Piece:
        choice = openai_choice(event)
        ids = ids_of(choice.get("token_ids") or ())
        told = choice.get("logprobs")
        tokens = [
            _with_logprobs(id, told, at) if told else Sampled(id) for at, id in enumerate(ids)
        ]
        return Piece(tuple(tokens), openai_finish(choice))


def _with_logprobs(token: int, told: Json, at: int) -> Sampled:
    tops = told.get("top_logprobs") or []
    best = tops[at] if at < len(tops) and tops[at] else {}
    ranked = sorted(best.items(), key=lambda entry: -entry[1])[:MAX_LOGPROBS]
    top = tuple(logprob(int(name.removeprefix(NAMED)), value) for name, value in ranked)
    return Sampled(token, "", logprob(token, told["token_logprobs"][at]).logprob, top)
