"""What clients send: the two request bodies, and what we refuse rather than ignore.

Fields that we do not know are accepted, since clients send many. Wrong types are a 400 that names
the field. A known parameter that would change the answer, but that nothing here can honour, is a
400 too.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import InvalidRequest

MAX_STOPS = 16
MAX_CHOICES = 16  # n

_Token = Annotated[int, Field(ge=0)]
_Tokens = Annotated[
    list[_Token], Field(fail_fast=True)
]  # a million wrong items are one error, not a million
_StopText = Annotated[str, Field(min_length=1, max_length=1024)]
_REFUSED = {  # fine while null, false or empty
    "audio": "answers are text",
    "function_call": "function calls are not parsed",
    "functions": "function calls are not parsed",
    "guided_choice": "constrained decoding is not supported",
    "guided_grammar": "constrained decoding is not supported",
    "guided_json": "constrained decoding is not supported",
    "guided_regex": "constrained decoding is not supported",
    "min_tokens": "a least number of tokens is not supported",
    "prompt_logprobs": "logprobs are given for the answer only",
    "structured_outputs": "constrained decoding is not supported",
    "suffix": "filling in the middle is not supported",
    "use_beam_search": "answers are sampled, not searched",
    "web_search_options": "nothing here searches the web",
}


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)
    include_usage: bool | None = None


class GenerationBody(BaseModel):
    """What both endpoints share. Null means the same as absent."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: (
        _StopText | Annotated[list[_StopText], Field(max_length=MAX_STOPS, fail_fast=True)] | None
    ) = None
    seed: int | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None  # -1 or 0 = all
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, Any] | None = None  # token ids in decimal -> numbers
    stop_token_ids: _Tokens | None = None
    ignore_eos: bool | None = None

    @classmethod
    def parse(cls, raw: bytes) -> Self:
        """Raises InvalidRequest that names the first wrong field."""
        try:
            body = cls.model_validate_json(raw)
        except ValidationError as error:
            raise _explained(error) from None
        body.refuse_unsupported()
        return body

    def refuse_unsupported(self) -> None:
        for name, value in (self.model_extra or {}).items():
            if value and name in _REFUSED:
                raise unsupported(name, _REFUSED[name])

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def wanted_logprobs(self) -> int:
        """As in Sampling: -1 = none, 0 = the chosen token's, k = with the k best alternatives."""
        raise NotImplementedError

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class Part(BaseModel):
    model_config = ConfigDict(strict=True)
    type: str
    text: str | None = None


class ChatMessage(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None


class ResponseFormat(BaseModel):
    model_config = ConfigDict(strict=True)
    type: str


class ChatBody(GenerationBody):
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: ResponseFormat | None = None
    modalities: Annotated[list[str], Field(fail_fast=True)] | None = None

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        if self.tool_choice not in (None, "none", "auto"):
            raise unsupported("tool_choice", "a tool call cannot be forced; use auto or none")
        if self.response_format and self.response_format.type != "text":
            raise unsupported("response_format", "constrained decoding is not supported")
        if set(self.modalities or ()) - {"text"}:
            raise unsupported("modalities", "answers are text")
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def wanted_logprobs(self) -> int:
        return (self.top_logprobs or 0) if self.logprobs else -1


class CompletionBody(GenerationBody):
    prompt: (
        str
        | Annotated[list[str], Field(fail_fast=True)]
        | _Tokens
        | Annotated[list[_Tokens], Field(fail_fast=True)]
    )
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        if self.best_of is not None and self.best_of > self.choices:
            raise unsupported("best_of", f"every answer is returned: at most n ({self.choices})")
        if self.echo and self.logprobs is not None:
            raise unsupported("echo", "logprobs are given for the answer only, not for the prompt")

    @property
    def wanted_logprobs(self) -> int:
        return -1 if self.logprobs is None else self.logprobs


def unsupported(param: str, why: str) -> InvalidRequest:
    error = InvalidRequest(f"{param} is not supported: {why}", param=param)
    error.code = "unsupported_parameter"
    return error


def _explained(error: ValidationError) -> InvalidRequest:
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    if problems[0]["type"] == "json_invalid":
        return InvalidRequest(f"the body is not valid JSON: {problems[0]['msg']}")
    param = _path(problems[0]["loc"])
    about = dict.fromkeys(problem["msg"] for problem in problems if _path(problem["loc"]) == param)
    return InvalidRequest(f"{param or 'body'}: {'; or '.join(about)}", param=param or None)


def _path(location: tuple[int | str, ...]) -> str:
    """`("messages", 0, "role")` -> `messages[0].role`; the names of union members are left out."""
    if len(location) > 1 and isinstance(location[1], int):
        field = f".{location[2]}" if len(location) > 2 else ""
        return f"{location[0]}[{location[1]}]{field}"
    return str(location[0]) if location else ""
