"""OpenAI's `/v1/completions` with text both ways, for servers that show no token ids.

The prompt goes as ids where the server takes them, else it is written out with its special tokens.
The answer is turned back into ids whose text is the same. Limits: no logprobs; no stop ids but the
model's own; an answer has as many tokens as we need to write it, which may be fewer or more than
the engine made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...models.text import Tokenizer
from ..request import Sampled, Sampling
from .dialect import (
    OPENAI,
    Dialect,
    Job,
    Json,
    Piece,
    Reader,
    openai_body,
    openai_choice,
    openai_finish,
)
from .retokenise import Retokeniser

NEVER = -100.0  # the bias of a token that must not come


class TextDialect(Dialect):
    """`extra` says under which names this kind of server takes settings beyond OpenAI's."""

    path = "v1/completions"

    def __init__(
        self,
        kind: str,
        model: str,
        tokenizer: Tokenizer,
        *,
        extra: Mapping[str, str],
        no_top_k: int,
        adds_bos: bool,
        takes_ids: bool,
    ) -> None:
        self.name = f"{kind}, {'token ids in, text out' if takes_ids else 'text'}"
        self._model, self._tokenizer = model, tokenizer
        self._extra, self._no_top_k = extra, no_top_k
        self._adds_bos, self._takes_ids = adds_bos, takes_ids
        self._retokeniser = Retokeniser(tokenizer)
        self.settings = OPENAI | frozenset(extra)

    def body(self, job: Job) -> dict[str, Any]:
        eos_ids = self._tokenizer.eos_ids
        body = openai_body(self._model, job)
        body["prompt"] = job.ids if self._takes_ids else self._written(job.ids)
        body |= {theirs: self._value(job.sampling, ours) for ours, theirs in self._extra.items()}
        if not {*eos_ids} & {*job.sampling.stop_ids}:
            ends = {str(token): NEVER for token in eos_ids}
            body["logit_bias"] = {**body.get("logit_bias", {}), **ends}
        return body

    def _value(self, sampling: Sampling, name: str) -> float:
        value: float = getattr(sampling, name)
        return self._no_top_k if name == "top_k" and not value else value

    def _written(self, ids: list[int]) -> str:
        """A server that puts the beginning of a text before every prompt gets it without."""
        has_bos = bool(ids) and ids[0] == self._tokenizer.bos_id
        return self._tokenizer.written(ids[1:] if self._adds_bos and has_bos else ids)

    def refuses_stops(self, stop_ids: frozenset[int]) -> str:
        if stop_ids <= {*self._tokenizer.eos_ids}:
            return ""
        return f"the engine behind this node ({self.name}) has no stop_token_ids"

    def reader(self) -> Reader:
        return TextReader(self._retokeniser)


class TextReader(Reader):
    def __init__(self, retokeniser: Retokeniser) -> None:
        self._retokeniser = retokeniser

    def read(self, event: Json) -> Piece:
        choice = openai_choice(event)
        ids = self._retokeniser.ids(choice.get("text") or "")
        return Piece(tuple(map(Sampled, ids)), openai_finish(choice))
