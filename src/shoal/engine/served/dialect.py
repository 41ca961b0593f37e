"""What is said to an engine of another make, and what its answer means. No sockets here.

Three dialects, best first: `llama.py`, llama.cpp's own `/completion` with token ids both ways;
`ids.py`, OpenAI's `/v1/completions` with ids both ways, as vLLM has it; `text.py`, the same with
text both ways, for every other server. What an engine cannot honour is named, never dropped.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import BackendFailed
from ..request import Ending, Sampled, Sampling, TokenLogprob

Json = Mapping[str, Any]
SEED_MASK = (1 << 31) - 1  # llama.cpp's seeds have 32 bits, and the highest means "any"
OPENAI = frozenset(
    (
        "temperature",
        "top_p",
        "presence_penalty",
        "frequency_penalty",
        "seed",
        "max_tokens",
        "stop_ids",
        "logit_bias",
    )
)
MORE = frozenset(("top_k", "min_p", "repetition_penalty", "logprobs"))


@dataclass(frozen=True, slots=True)
class Job:
    """One session's work: the prompt, and the output so far if another route began it."""

    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    sampling: Sampling

    @property
    def ids(self) -> list[int]:
        return [*self.prompt_ids, *self.output_ids]

    @property
    def room(self) -> int:
        """Tokens that may still come."""
        return self.sampling.max_tokens - len(self.output_ids)


@dataclass(frozen=True, slots=True)
class Piece:
    """What one event brought. `finish` is the engine's own word on why it ends."""

    tokens: tuple[Sampled, ...] = ()
    finish: Ending = ""


class Reader(ABC):
    """State of one answer."""

    @abstractmethod
    def read(self, event: Json) -> Piece:
        """Raises BackendFailed for an error of the engine; what is no answer at all may raise
        anything that walking through foreign JSON can.
        """


class Dialect(ABC):
    """`name` is for people; requests are posted to `path`; `settings` are those it honours."""

    name: str
    path: str
    settings: frozenset[str]

    @abstractmethod
    def body(self, job: Job) -> dict[str, Any]:
        """The request, for JSON."""

    @abstractmethod
    def reader(self) -> Reader:
        """For the events of one answer."""

    def refuses(self, sampling: Sampling) -> str:
        """Why this engine cannot do what is asked, or "". A setting that nobody here has heard of
        is refused as well, unless it has its default.
        """
        usual = Sampling()
        names = Sampling.__struct_fields__
        asked = {name for name in names if getattr(sampling, name) != getattr(usual, name)}
        if unknown := sorted(asked - self.settings):
            return f"the engine behind this node ({self.name}) has no {', '.join(unknown)}"
        return self.refuses_stops(frozenset(sampling.stop_ids))

    def refuses_stops(self, stop_ids: frozenset[int]) -> str:
        """Those that see ids stop wherever they are told to."""
        return ""


def openai_body(model: str, job: Job) -> dict[str, Any]:
    """What every server of OpenAI's completions understands; the prompt is still missing."""
    asked = job.sampling
    body = {
        "model": model,
        "max_tokens": job.room,
        "stream": True,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "presence_penalty": asked.presence_penalty,
        "frequency_penalty": asked.frequency_penalty,
        "seed": asked.seed & SEED_MASK,
    }
    bias = {str(token): value for token, value in asked.logit_bias.items()}
    return body | ({"logit_bias": bias} if bias else {})


def openai_choice(event: Json) -> Json:
    """The one choice of an event; an empty one where it only counts tokens."""
    check(event)
    choices = event.get("choices") or [{}]
    choice: Json = choices[0]
    return choice


def openai_finish(choice: Json) -> Ending:
    finish = choice.get("finish_reason")
    if finish in (None, "stop", "length"):
        return finish or ""
    raise BackendFailed(f"the engine ended with {str(finish)[:40]!r}")


def ids_of(raw: Sequence[object]) -> list[int]:
    """Raises ValueError for anything else."""
    ids = [token for token in raw if type(token) is int and 0 <= token < 1 << 32]
    if len(ids) != len(raw):
        raise ValueError("token ids are numbers")
    return ids


def logprob(token: object, value: object) -> TokenLogprob:
    if type(token) is not int or not isinstance(value, int | float):
        raise ValueError("a logprob is a number")
    return TokenLogprob(token, float(value))


def check(event: Json) -> None:
    """Raises BackendFailed when the event is an error."""
    error = event.get("error")
    if error is None and event.get("object") == "error":  # older vLLM
        error = event
    if error is not None:
        told = error.get("message") if isinstance(error, dict) else error
        raise BackendFailed(f"the engine says: {str(told)[:200]}")
