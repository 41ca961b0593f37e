"""Turns what a request says into token ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import anyio

from ..errors import InvalidRequest, NoRoute
from ..models.text import Tokenizer
from .backend import ServedModel
from .bodies import ChatBody, ChatMessage, CompletionBody, ToolSpec, unsupported
from .config import ApiConfig
from .dialect import dialect_of, told_in_words
from .sampling import check_token_ids
from .tools import Tools, with_parsed_arguments

_Result = TypeVar("_Result")


def tokenizer_of(model: ServedModel) -> Tokenizer:
    """Raises NoRoute when this gateway cannot turn the model's tokens into text."""
    if model.tokenizer is None:
        raise NoRoute(
            f"the files of {model.id} are not on this node, which cannot read text without them",
            hint=f"ask a node that serves it, or: shoal up --model {model.id}",
        )
    return model.tokenizer


async def chat_prompt(
    body: ChatBody, tokenizer: Tokenizer, config: ApiConfig, offered: Tools | None = None
) -> tuple[int, ...]:
    """The conversation in the model's own template, as token ids."""
    messages = _named([_plain(message, index) for index, message in enumerate(body.messages)])
    tools = [_shown(tool) for tool in body.offered_tools] or None
    dialect = offered.dialect if offered else dialect_of(tokenizer)
    if not dialect.in_template:
        messages, tools = told_in_words(messages, tools or ()), None

    def render() -> tuple[int, ...]:
        return tuple(tokenizer.encode(tokenizer.render_chat(messages, tools), add_special=False))

    size = sum(len(message["content"]) for message in messages)
    return _not_empty(await _maybe_in_thread(render, size > config.thread_characters), "messages")


async def completion_prompts(
    body: CompletionBody, tokenizer: Tokenizer, config: ApiConfig
) -> list[tuple[int, ...]]:
    """One tuple of token ids for each prompt of the request."""
    prompts = _prompts_in(body.prompt)
    if len(prompts) * body.choices > config.max_choices:
        raise InvalidRequest(
            f"{len(prompts)} prompts with {body.choices} answers each are more than the "
            f"{config.max_choices} sequences of one request",
            hint="send several requests",
            param="prompt",
        )
    return [await _prompt_ids(prompt, tokenizer, config) for prompt in prompts]


def _prompts_in(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    texts: list[str | list[int]] = [item for item in prompt if not isinstance(item, int)]
    if texts:
        return texts
    return [[item for item in prompt if isinstance(item, int)]]


async def _prompt_ids(
    prompt: str | list[int], tokenizer: Tokenizer, config: ApiConfig
) -> tuple[int, ...]:
    if isinstance(prompt, list):
        check_token_ids(prompt, tokenizer, "prompt")
        return _not_empty(tuple(prompt), "prompt")
    long = len(prompt) > config.thread_characters
    return _not_empty(
        await _maybe_in_thread(lambda: tuple(tokenizer.encode(prompt)), long), "prompt"
    )


async def _maybe_in_thread(work: Callable[[], _Result], long: bool) -> _Result:
    """Long texts take the tokenizer many milliseconds, in which no stream should stand still."""
    return await anyio.to_thread.run_sync(work) if long else work()


def _not_empty(ids: tuple[int, ...], param: str) -> tuple[int, ...]:
    if not ids:
        raise InvalidRequest("the prompt has no tokens", hint="send some text", param=param)
    return ids


def _plain(message: ChatMessage, index: int) -> dict[str, Any]:
    """A message as chat templates expect it: its content is one text."""
    plain = message.model_dump(exclude_none=True)
    plain["role"] = "system" if message.role == "developer" else message.role
    plain["content"] = _text_of(message, f"messages[{index}].content")
    if message.tool_calls:
        param = f"messages[{index}].tool_calls"
        plain["tool_calls"] = with_parsed_arguments(message.tool_calls, param)
    else:
        plain.pop("tool_calls", None)
    return plain


def _named(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results of tools, with the name of the tool that gave them: some templates ask for it."""
    name_of: dict[str, str] = {}
    for message in messages:
        for call in message.get("tool_calls", ()):
            name_of[str(call.get("id"))] = call["function"]["name"]
        known = name_of.get(message.get("tool_call_id", ""))
        if message["role"] == "tool" and known:
            message.setdefault("name", known)
    return messages


def _shown(tool: ToolSpec) -> dict[str, Any]:
    """A tool as templates write it."""
    return tool.model_dump(exclude_none=True, exclude={"function": {"strict"}})


def _text_of(message: ChatMessage, param: str) -> str:
    if message.content is None or isinstance(message.content, str):
        return message.content or ""
    for part in message.content:
        if part.type != "text" or part.text is None:
            raise unsupported(param, f"parts of type {part.type!r}; the models here read text only")
    return "".join(part.text or "" for part in message.content)
