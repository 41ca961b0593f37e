"""The JSON that clients get, in exactly OpenAI's shapes: whole answers and events of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
from msgspec import UNSET, UnsetType

from ..models.text import Tokenizer
from .calls import Call
from .choice import Piece, Placed
from .logprobs import ChatLogprobs, CompletionLogprobs, chat_logprobs, completion_logprobs

DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, prompt: int, completion: int) -> Usage:
        return cls(prompt, completion, prompt + completion)


class CalledFunction(msgspec.Struct):
    name: str
    arguments: str  # JSON


class ToolCall(msgspec.Struct):
    id: str
    function: CalledFunction
    type: str = "function"
    index: int | UnsetType = UNSET  # in streams


class Message(msgspec.Struct):
    role: str
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | UnsetType = UNSET


class Delta(msgspec.Struct, omit_defaults=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct):
    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChatChunkChoice(msgspec.Struct):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class TextChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None


class Envelope(msgspec.Struct):
    """What surrounds the choices; the same for all events of one stream."""

    id: str
    object: str
    created: int
    model: str
    choices: Sequence[ChatChoice | ChatChunkChoice | TextChoice]
    system_fingerprint: str
    usage: Usage | UnsetType | None = UNSET


@dataclass(frozen=True, slots=True)
class Heading:
    """What every answer to one request carries."""

    id: str
    created: int  # unix seconds
    model: str
    fingerprint: str
    include_usage: bool  # then every event but the last says `usage: null`


@dataclass(slots=True)
class Result:
    """One choice, gathered from its pieces."""

    text: str = ""
    tokens: list[Placed] = field(default_factory=list)
    finish: str = ""
    calls: list[Call] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += piece.tokens
        self.finish = piece.finish
        self.calls += piece.calls


class Shape(Protocol):
    """One of the two dialects. Events come back framed for a stream."""

    def opening(self, index: int) -> bytes:
        """What a choice says before its first token."""
        ...

    def piece(self, index: int, piece: Piece) -> bytes:
        """What one token adds, b"" when that is nothing."""
        ...

    def closing(self, index: int, finish: str) -> bytes: ...

    def usage(self, usage: Usage) -> bytes: ...

    def whole(self, results: Sequence[Result], usage: Usage) -> bytes: ...


class _Shape:
    _whole_object: str
    _event_object: str

    def __init__(self, heading: Heading, tokenizer: Tokenizer) -> None:
        self._heading = heading
        self._tokenizer = tokenizer
        self._usage_of_events: UnsetType | None = None if heading.include_usage else UNSET

    def usage(self, usage: Usage) -> bytes:
        return _event(self._envelope(self._event_object, [], usage))

    def _event(self, choice: ChatChunkChoice | TextChoice) -> bytes:
        return _event(self._envelope(self._event_object, [choice], self._usage_of_events))

    def _envelope(
        self, kind: str, choices: Sequence[Any], usage: Usage | UnsetType | None
    ) -> Envelope:
        about = self._heading
        return Envelope(
            about.id, kind, about.created, about.model, choices, about.fingerprint, usage
        )


class ChatShape(_Shape):
    _whole_object = "chat.completion"
    _event_object = "chat.completion.chunk"

    def opening(self, index: int) -> bytes:
        return self._event(ChatChunkChoice(index, Delta("assistant", "")))

    def piece(self, index: int, piece: Piece) -> bytes:
        if not piece.text and not piece.tokens and not piece.calls:
            return b""
        calls = [_tool_call(call, at) for at, call in enumerate(piece.calls, piece.first_call)]
        said = piece.text if piece.text or not calls else UNSET
        delta = Delta(content=said, tool_calls=calls or UNSET)
        return self._event(ChatChunkChoice(index, delta, self._logprobs(piece.tokens)))

    def closing(self, index: int, finish: str) -> bytes:
        return self._event(ChatChunkChoice(index, Delta(), None, finish))

    def whole(self, results: Sequence[Result], usage: Usage) -> bytes:
        choices = [
            ChatChoice(
                index,
                _message(result),
                self._logprobs(result.tokens),
                result.finish,
            )
            for index, result in enumerate(results)
        ]
        return _encode(self._envelope(self._whole_object, choices, usage))

    def _logprobs(self, tokens: Sequence[Placed]) -> ChatLogprobs | None:
        return chat_logprobs(tokens, self._tokenizer) if tokens else None


class TextShape(_Shape):
    """`echoes` holds the prompt's text for each choice, "" where it is not asked for."""

    _whole_object = _event_object = "text_completion"

    def __init__(
        self, heading: Heading, tokenizer: Tokenizer, echoes: Sequence[str], with_top: bool
    ) -> None:
        super().__init__(heading, tokenizer)
        self._echoes = echoes
        self._with_top = with_top

    def opening(self, index: int) -> bytes:
        echo = self._echoes[index]
        return self._event(TextChoice(index, echo)) if echo else b""

    def piece(self, index: int, piece: Piece) -> bytes:
        if not piece.text and not piece.tokens:
            return b""
        return self._event(TextChoice(index, piece.text, self._logprobs(piece.tokens)))

    def closing(self, index: int, finish: str) -> bytes:
        return self._event(TextChoice(index, "", None, finish))

    def whole(self, results: Sequence[Result], usage: Usage) -> bytes:
        choices = [
            TextChoice(index, echo + result.text, self._logprobs(result.tokens), result.finish)
            for index, (echo, result) in enumerate(zip(self._echoes, results, strict=True))
        ]
        return _encode(self._envelope(self._whole_object, choices, usage))

    def _logprobs(self, tokens: Sequence[Placed]) -> CompletionLogprobs | None:
        return completion_logprobs(tokens, self._tokenizer, self._with_top) if tokens else None


def _message(result: Result) -> Message:
    if not result.calls:
        return Message("assistant", result.text)
    calls = [_tool_call(call) for call in result.calls]
    return Message("assistant", result.text or None, tool_calls=calls)


def _tool_call(call: Call, index: int | UnsetType = UNSET) -> ToolCall:
    return ToolCall(call.id, CalledFunction(call.name, call.arguments), index=index)


def _event(envelope: Envelope) -> bytes:
    return b"data: " + _encode(envelope) + b"\n\n"
