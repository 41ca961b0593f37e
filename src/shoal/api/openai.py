"""OpenAI's two generating endpoints: from a body to a job, which `answer.py` carries out."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from starlette.types import Message, Receive, Scope, Send

from ..engine.request import Grammar
from ..errors import InvalidRequest
from .answer import Answerer, Job
from .backend import Backend, GenerationRequest, ServedModel
from .bodies import ChatBody, CompletionBody, GenerationBody
from .config import ApiConfig
from .failures import HttpError
from .prompts import chat_prompt, completion_prompts, tokenizer_of
from .sampling import for_choice, room_for_answer, sampling_of
from .shapes import ChatShape, Heading, TextShape
from .tools import grammar_of, tools_of
from .turnstile import Turnstile


class Understand(Protocol):
    async def __call__(self, raw: bytes, backend: Backend, config: ApiConfig) -> Job: ...


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An ASGI application for one path: reads the body, understands it, answers."""

    understand: Understand
    backend: Backend
    answerer: Answerer
    turnstile: Turnstile
    config: ApiConfig

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        _check_content_type(scope)
        raw = await _read_body(receive, self.config)
        await self.turnstile.enter()
        job = await self.understand(raw, self.backend, self.config)
        await self.answerer.answer(job, scope, receive, send)


async def understand_chat(raw: bytes, backend: Backend, config: ApiConfig) -> Job:
    body = ChatBody.parse(raw)
    model = backend.find(body.model)
    tokenizer = tokenizer_of(model)
    tools = tools_of(body, tokenizer)
    grammar = await grammar_of(body, tools)
    prompt = await chat_prompt(body, tokenizer, config, tools)
    heading = _heading("chatcmpl", body, model)
    return Job(
        requests=_requests(body, model, [prompt], config, grammar),
        tokenizer=tokenizer,
        stops=body.stops,
        prompt_tokens=len(prompt),
        shape=ChatShape(heading, tokenizer),
        stream=bool(body.stream),
        include_usage=heading.include_usage,
        tools=tools,
    )


async def understand_completion(raw: bytes, backend: Backend, config: ApiConfig) -> Job:
    body = CompletionBody.parse(raw)
    model = backend.find(body.model)
    tokenizer = tokenizer_of(model)
    prompts = await completion_prompts(body, tokenizer, config)
    heading = _heading("cmpl", body, model)
    echoes = [tokenizer.decode(prompt) if body.echo else "" for prompt in prompts]
    of_choices = [echo for echo in echoes for _ in range(body.choices)]
    return Job(
        requests=_requests(body, model, prompts, config),
        tokenizer=tokenizer,
        stops=body.stops,
        prompt_tokens=sum(map(len, prompts)),
        shape=TextShape(heading, tokenizer, of_choices, with_top=body.wanted_logprobs > 0),
        stream=bool(body.stream),
        include_usage=heading.include_usage,
        continues=True,
    )


def _requests(
    body: GenerationBody,
    model: ServedModel,
    prompts: Sequence[tuple[int, ...]],
    config: ApiConfig,
    grammar: Grammar | None = None,
) -> tuple[GenerationRequest, ...]:
    """One for each choice: the n choices of the first prompt, then those of the second."""
    seed, requests = secrets.randbits(63), []
    for prompt in prompts:
        room = room_for_answer(model, len(prompt), body.wanted_tokens, config.default_max_tokens)
        sampling = sampling_of(body, tokenizer_of(model), room, seed, grammar)
        for index in range(body.choices):
            requests.append(GenerationRequest(model.id, prompt, for_choice(sampling, index)))
    return tuple(requests)


def _heading(prefix: str, body: GenerationBody, model: ServedModel) -> Heading:
    return Heading(
        id=f"{prefix}-{secrets.token_hex(16)}",
        created=int(time.time()),
        model=model.id,
        fingerprint=model.fingerprint,
        include_usage=body.include_usage,
    )


def _check_content_type(scope: Scope) -> None:
    """Only JSON: a web page can post a form to us without asking, but not JSON."""
    given = next((value for name, value in scope["headers"] if name == b"content-type"), b"")
    if given.partition(b";")[0].strip().lower() != b"application/json":
        raise HttpError(
            415,
            "not_json",
            f"the content type is {given.decode('latin-1') or 'missing'}, not application/json",
            hint="send the header `Content-Type: application/json`",
        )


async def _read_body(receive: Receive, config: ApiConfig) -> bytes:
    """The whole body; its length is counted, never believed."""
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(config.body_timeout_s):
            while True:
                message = await receive()
                chunk = _chunk(message)
                chunks.append(chunk)
                size += len(chunk)
                if size > config.max_body_bytes:
                    raise HttpError(
                        413,
                        "body_too_large",
                        f"the body is larger than {config.max_body_bytes} bytes",
                    )
                if not message.get("more_body", False):
                    return b"".join(chunks)
    except TimeoutError:
        raise HttpError(
            408, "body_too_slow", f"the body took longer than {config.body_timeout_s:g} s"
        ) from None


def _chunk(message: Message) -> bytes:
    if message["type"] == "http.disconnect":
        raise InvalidRequest("the client left before its request was whole")
    body: bytes = message.get("body", b"")
    return body
