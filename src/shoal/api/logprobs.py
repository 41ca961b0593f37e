"""Logprobs in the two forms of OpenAI's interface."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from ..models.text import Tokenizer
from .choice import Placed

_LEAST = -9999.0  # OpenAI's word for "as good as impossible"; JSON has no minus infinity


class Alternative(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class ChatToken(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[Alternative]


class ChatLogprobs(msgspec.Struct):
    content: list[ChatToken]
    refusal: None = None


class CompletionLogprobs(msgspec.Struct):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


def chat_logprobs(tokens: Iterable[Placed], tokenizer: Tokenizer) -> ChatLogprobs:
    def alternative(token: int, logprob: float) -> Alternative:
        text, raw = tokenizer.token_text(token), tokenizer.token_bytes(token)
        return Alternative(text, _finite(logprob), list(raw))

    content = []
    for _, sampled in tokens:
        chosen = alternative(sampled.token, sampled.logprob or 0.0)
        top = [alternative(other.token, other.logprob) for other in sampled.top]
        content.append(ChatToken(chosen.token, chosen.logprob, chosen.bytes, top))
    return ChatLogprobs(content)


def completion_logprobs(
    tokens: Sequence[Placed], tokenizer: Tokenizer, with_top: bool
) -> CompletionLogprobs:
    """The chosen token is always among its alternatives, so there may be one more than asked."""
    name = tokenizer.token_text
    logprobs = [_finite(sampled.logprob or 0.0) for _, sampled in tokens]
    top: list[dict[str, float]] = []
    for (_, sampled), logprob in zip(tokens, logprobs, strict=True):
        best = {name(other.token): _finite(other.logprob) for other in reversed(sampled.top)}
        top.append(dict(reversed(best.items())) | {name(sampled.token): logprob})
    return CompletionLogprobs(
        tokens=[name(sampled.token) for _, sampled in tokens],
        token_logprobs=logprobs,
        top_logprobs=top if with_top else None,
        text_offset=[start for start, _ in tokens],
    )


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)
