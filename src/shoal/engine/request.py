"""What a client may ask of the sampler, and what it answers. No torch here: gateways without an
engine use it too.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import msgspec

MAX_LOGPROBS = 20  # as many alternatives as OpenAI's API allows
MAX_BIASED_TOKENS = 1024
MAX_STOP_TOKENS = 256
MAX_GRAMMAR_BYTES = 40 << 10  # with all else of a Sampling it must fit into a frame's header


class Grammar(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the text must be: any JSON object, JSON of a schema, or calls of tools (`text` is then a
    schema, or a `ToolRules` of `grammar_source.py`, in JSON).
    """

    kind: Literal["json_object", "json_schema", "tools"]
    text: str = ""

    def __post_init__(self) -> None:
        size = len(self.text.encode(errors="replace"))
        if size > MAX_GRAMMAR_BYTES:
            raise ValueError(
                f"grammar of {size} bytes is larger than the {MAX_GRAMMAR_BYTES} that are allowed"
            )


class Sampling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the last stage chooses tokens for one session. Defaults are OpenAI's; `temperature` 0 is
    greedy.

    Checked here once, whoever built it: a peer's Sampling is decoded by msgspec and passes through
    `__post_init__` too.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 = all
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output, as in transformers
    presence_penalty: float = 0.0  # over the output only, as OpenAI and vLLM do
    frequency_penalty: float = 0.0
    seed: int = 0  # the gateway draws one when the client gives none
    logprobs: int = -1  # -1 = none, 0 = only the chosen token's, n = with the n best alternatives
    logit_bias: dict[int, float] = {}
    stop_ids: tuple[
        int, ...
    ] = ()  # end-of-text ids and stop_token_ids; the matching token ends the session
    max_tokens: int = 1024
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        limits = (
            ("temperature", self.temperature, 0.0, 100.0),
            ("top_p", self.top_p, 0.0, 1.0),
            ("top_k", self.top_k, 0, 1 << 31),
            ("min_p", self.min_p, 0.0, 1.0),
            ("repetition_penalty", self.repetition_penalty, 0.01, 100.0),
            ("presence_penalty", self.presence_penalty, -2.0, 2.0),
            ("frequency_penalty", self.frequency_penalty, -2.0, 2.0),
            ("logprobs", self.logprobs, -1, MAX_LOGPROBS),
            ("max_tokens", self.max_tokens, 1, 1 << 31),
            ("logit_bias entries", len(self.logit_bias), 0, MAX_BIASED_TOKENS),
            ("stop_ids entries", len(self.stop_ids), 0, MAX_STOP_TOKENS),
        )
        for name, value, low, high in limits:
            if not low <= value <= high:  # NaN fails too
                raise ValueError(f"{name} must be between {low} and {high}, not {value}")
        for token, bias in self.logit_bias.items():
            if token < 0 or not -100.0 <= bias <= 100.0:
                raise ValueError("logit_bias maps token ids to numbers between -100 and 100")


TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
Ending = Literal["", "stop", "length"]


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """A token id and the natural logarithm of its probability before temperature and filters."""

    token: TokenId
    logprob: float

    def __post_init__(self) -> None:
        _check_finite(self.logprob)


class Sampled(msgspec.Struct, frozen=True):
    """One chosen token. `finish` is "" while the session goes on, else "stop" or "length"."""

    token: TokenId
    finish: Ending = ""
    logprob: float | None = None
    top: Annotated[tuple[TokenLogprob, ...], msgspec.Meta(max_length=MAX_LOGPROBS)] = ()

    def __post_init__(self) -> None:
        if self.logprob is not None:
            _check_finite(self.logprob)


def _check_finite(logprob: float) -> None:
    if not math.isfinite(logprob):  # a peer's, which JSON cannot hold; the sampler makes none
        raise ValueError("a logprob must be a number")
