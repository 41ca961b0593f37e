"""What clients send: the two request bodies, and what we refuse rather than ignore.

Fields that we do not know are accepted, since clients send many. Wrong types are a 400 that names
the field. A known parameter that would change the answer, but that nothing here can honour, is a
400 too.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import InvalidRequest

MAX_STOPS = 16
MAX_CHOICES = 16  # n
MAX_TOOLS = 128

_Token = Annotated[int, Field(ge=0)]
_Tokens = Annotated[
    list[_Token], Field(fail_fast=True)
]  # a million wrong items are one error, not a million
_StopText = Annotated[str, Field(min_length=1, max_length=1024)]
_REFUSED = {  # fine while null, false or empty
    "audio": "answers are text",
    "function_call": "use tools and tool_choice",
    "functions": "use tools and tool_choice",
    "guided_choice": "use response_format with a JSON schema",
    "guided_grammar": "use response_format with a JSON schema",
    "guided_json": "use response_format with a JSON schema",
    "guided_regex": "use response_format with a JSON schema",
    "min_tokens": "a least number of tokens is not supported",
    "prompt_logprobs": "logprobs are given for the answer only",
    "structured_outputs": "use response_format with a JSON schema",
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


class FunctionSpec(BaseModel):
    model_config = ConfigDict(strict=True)
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None  # a JSON schema
    strict: bool | None = None


class ToolSpec(BaseModel):
    model_config = ConfigDict(strict=True)
    type: Literal["function"]
    function: FunctionSpec


class FunctionName(BaseModel):
    model_config = ConfigDict(strict=True)
    name: str


class NamedTool(BaseModel):
    model_config = ConfigDict(strict=True)
    type: Literal["function"]
    function: FunctionName


class NamedSchema(BaseModel):
    model_config = ConfigDict(strict=True)
    content: dict[str, Any] = Field(alias="schema")


class ResponseFormat(BaseModel):
    model_config = ConfigDict(strict=True)
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @property
    def schema_text(self) -> str:
        content = self.json_schema.content if self.json_schema else {}
        return json.dumps(content, ensure_ascii=False)


class ChatBody(GenerationBody):
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Annotated[list[ToolSpec], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    modalities: Annotated[list[str], Field(fail_fast=True)] | None = None

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        self._check_tools()
        self._check_response_format()
        if set(self.modalities or ()) - {"text"}:
            raise unsupported("modalities", "answers are text")
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")

    def _check_tools(self) -> None:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise InvalidRequest("two tools have the same name", param="tools")
        if self.forces_call and not names:
            raise InvalidRequest("tool_choice asks for a call, but no tools", param="tool_choice")
        if self.named_tool and self.named_tool not in names:
            raise InvalidRequest(
                f"tool_choice asks for {self.named_tool!r}, which is not among the tools",
                param="tool_choice",
            )

    def _check_response_format(self) -> None:
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return
        if wanted.type == "json_schema" and wanted.json_schema is None:
            raise InvalidRequest("json_schema is missing", param="response_format")
        if self.offered_tools:
            raise unsupported("response_format", 'not beside tools, unless tool_choice is "none"')

    @property
    def named_tool(self) -> str:
        """The only tool that may be called, and must be; "" where there is none."""
        choice = self.tool_choice
        return choice.function.name if isinstance(choice, NamedTool) else ""

    @property
    def forces_call(self) -> bool:
        return self.tool_choice == "required" or bool(self.named_tool)

    @property
    def offered_tools(self) -> list[ToolSpec]:
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def callable_tools(self) -> list[ToolSpec]:
        named = self.named_tool
        return [each for each in self.offered_tools if named in ("", each.function.name)]

    @property
    def restricts_calls(self) -> bool:
        """True when not just any answer will do."""
        strict = any(each.function.strict for each in self.offered_tools)
        return self.forces_call or strict or self.parallel_tool_calls is False

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
