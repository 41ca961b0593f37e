"""Turns what a request says into token ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import anyio

from ..errors import InvalidRequest, NoRoute
from ..models.text import Tokenizer
from .backend import ServedModel
from .bodies import ChatBody, ChatMessage, CompletionBody, unsupported
from .config import ApiConfig
from .sampling import check_token_ids

_Result = TypeVar("_Result")


def tokenizer_of(model: ServedModel) -> Tokenizer:
    """Raises NoRoute when this gateway cannot turn the model's tokens into text."""
    if model.tokenizer is None:
        raise NoRoute(
            f"the files of {model.id} are not on this node, which cannot read text without them",
            hint=f"ask a node that serves it, or: shoal up --model {model.id}",
        )
    return model.tokenizer


async def chat_prompt(body: ChatBody, tokenizer: Tokenizer, config: ApiConfig) -> tuple[int, ...]:
    """The conversation in the model's own template, as token ids."""
    messages = [_plain(message, index) for index, message in enumerate(body.messages)]
    tools = None if body.tool_choice == "none" else body.tools

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
    return plain


def _text_of(message: ChatMessage, param: str) -> str:
    if message.content is None or isinstance(message.content, str):
        return message.content or ""
    for part in message.content:
        if part.type != "text" or part.text is None:
            raise unsupported(param, f"parts of type {part.type!r}; the models here read text only")
    return "".join(part.text or "" for part in message.content)
