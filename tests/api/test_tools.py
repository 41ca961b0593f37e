"""Tools and structured answers: the official client, and a model that says at random whatever the
grammar lets it.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
import torch
from openai import AsyncOpenAI, BadRequestError
from pydantic import BaseModel, Field

from shoal.api import GenerationRequest
from shoal.api.dialect import GENERIC, HERMES, LLAMA, MISTRAL, Dialect, dialect_of
from shoal.engine import grammar as grammars
from shoal.engine.grammar import Grammars
from shoal.engine.request import Sampled
from shoal.engine.sampling import SamplerState, sample
from shoal.errors import InvalidRequest
from shoal.models.chat_template import ChatTemplate
from shoal.models.checkpoint import open_checkpoint
from shoal.models.text import Tokenizer
from shoal.units import SessionId

from .stub import TOKENIZER, StubBackend, byte_tokenizer

pytestmark = pytest.mark.anyio

CHAT: dict[str, Any] = {"model": "shoal-tiny", "messages": [{"role": "user", "content": "hi"}]}
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["x"],
    "additionalProperties": False,
}
LOOK = {"type": "function", "function": {"name": "look", "parameters": POINT}}
WAIT = {"type": "function", "function": {"name": "wait", "description": "Do nothing."}}
CALL = '<tool_call>\n{"name": "look", "arguments": {"x": 5}}\n</tool_call>'
TINY = open_checkpoint("shoal-tiny")
SPEECH = Tokenizer.open(TINY.folder)
GRAMMARS = Grammars.of(SPEECH, TINY.vocab_size)


class RandomGeneration:
    """Samples from random logits, as the last stage does."""

    def __init__(self, request: GenerationRequest) -> None:
        self.session, self.route = SessionId("0123456789abcdef"), (("amber-fox", "0:4"),)
        wanted = request.sampling
        matcher = GRAMMARS.matcher(wanted.grammar, 20) if wanted.grammar else None
        self._sampler = SamplerState(wanted, request.prompt_ids, (), matcher)
        self._chance = torch.Generator().manual_seed(request.sampling.seed % 1000)

    async def __aiter__(self) -> AsyncIterator[Sampled]:
        finish = ""
        while not finish:
            logits = torch.randn(1, TINY.vocab_size, generator=self._chance) * 3
            (sampled,) = sample(logits, [self._sampler])
            finish = sampled.finish
            yield sampled

    async def aclose(self) -> None: ...


@pytest.fixture(autouse=True)
def _room_for_tools(backend: StubBackend) -> None:
    backend.model = replace(backend.model, context_length=4096)


@pytest.fixture
def random_model(backend: StubBackend) -> StubBackend:
    """The stub behind the API becomes a model that knows no JSON, with a real tokenizer."""
    backend.model = replace(backend.model, tokenizer=SPEECH)

    async def generate(request: GenerationRequest) -> RandomGeneration:
        backend.requests.append(request)
        return RandomGeneration(request)

    backend.generate = generate  # type: ignore[method-assign,assignment]
    return backend


# ---- structured answers


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_is_json_of_the_schema(
    openai: AsyncOpenAI, random_model: StubBackend, stream: bool
) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "point", "schema": POINT}}
    for seed in range(5):
        answer = await openai.chat.completions.create(
            **CHAT, response_format=wanted, seed=seed, stream=stream
        )
        if stream:
            chunks = [chunk.choices[0] async for chunk in answer]
            text, finish = "".join(c.delta.content or "" for c in chunks), chunks[-1].finish_reason
        else:
            (choice,) = answer.choices
            text, finish = choice.message.content, choice.finish_reason
        assert finish == "stop"
        jsonschema.validate(json.loads(text), POINT)


async def test_the_client_parses_an_answer_into_its_own_class(
    openai: AsyncOpenAI, random_model: StubBackend
) -> None:
    class Boat(BaseModel):
        sails: int = Field(ge=0, le=9)
        kind: str = Field(max_length=8)

    answer = await openai.chat.completions.parse(
        **CHAT, response_format=Boat, n=2, seed=1, max_tokens=300, logprobs=True
    )
    for choice in answer.choices:
        assert isinstance(choice.message.parsed, Boat)
        assert choice.logprobs.content


async def test_max_tokens_cut_an_object_honestly(
    openai: AsyncOpenAI, random_model: StubBackend
) -> None:
    answer = await openai.chat.completions.create(
        **CHAT, response_format={"type": "json_object"}, max_tokens=1
    )
    assert answer.choices[0].finish_reason == "length"


async def test_without_the_library_a_gateway_leaves_the_check_to_the_stage(
    openai: AsyncOpenAI, backend: StubBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_here() -> None:
        raise InvalidRequest("not here")

    monkeypatch.setattr(grammars, "_library", none_here)
    wrong = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strin"}}}
    await openai.chat.completions.create(**CHAT, response_format=wrong)
    assert backend.requests[0].sampling.grammar.kind == "json_schema"


async def test_a_schema_that_cannot_be_used_is_said_so(openai: AsyncOpenAI) -> None:
    wrong = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}
    with pytest.raises(BadRequestError, match="not") as refused:
        await openai.chat.completions.create(**CHAT, response_format=wrong)
    assert refused.value.param == "response_format"


# ---- calls of tools


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look"}}])
async def test_a_forced_call_has_arguments_of_its_schema(
    openai: AsyncOpenAI, random_model: StubBackend, choice: Any
) -> None:
    answer = await openai.chat.completions.create(
        **CHAT, tools=[LOOK], tool_choice=choice, n=3, parallel_tool_calls=False
    )
    ids = set()
    for each in answer.choices:
        assert (each.finish_reason, each.message.content) == ("tool_calls", None)
        (call,) = each.message.tool_calls
        assert (call.type, call.function.name) == ("function", "look")
        jsonschema.validate(json.loads(call.function.arguments), POINT)
        ids.add(call.id)
    assert len(ids) == 3


async def test_a_call_is_found_in_what_the_model_says(
    openai: AsyncOpenAI, backend: StubBackend
) -> None:
    backend.text = f"Let me see. {CALL}\n{CALL}"
    answer = await openai.chat.completions.create(**CHAT, tools=[LOOK, WAIT])
    (choice,) = answer.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me see. ")
    assert [call.function.arguments for call in choice.message.tool_calls] == ['{"x": 5}'] * 2
    assert backend.requests[0].sampling.grammar is None


async def test_calls_are_streamed(openai: AsyncOpenAI, backend: StubBackend) -> None:
    backend.text = f"So: {CALL}\n{CALL}"
    stream = await openai.chat.completions.create(**CHAT, tools=[LOOK], stream=True)
    chunks = [chunk.choices[0] async for chunk in stream]
    calls = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    assert [(call.index, call.function.name) for call in calls] == [(0, "look"), (1, "look")]
    assert len({call.id for call in calls}) == 2
    assert "".join(chunk.delta.content or "" for chunk in chunks) == "So: "
    assert chunks[-1].finish_reason == "tool_calls"


async def test_an_answer_without_a_call_stays_as_it_is(openai: AsyncOpenAI) -> None:
    answer = await openai.chat.completions.create(**CHAT, tools=[LOOK], tool_choice="auto")
    (choice,) = answer.choices
    assert (choice.finish_reason, choice.message.content) == ("stop", "Hello, world")
    assert choice.message.tool_calls is None


async def test_with_no_tool_allowed_a_call_is_text_and_tools_are_not_shown(
    openai: AsyncOpenAI, backend: StubBackend
) -> None:
    backend.text = CALL
    answer = await openai.chat.completions.create(**CHAT, tools=[LOOK], tool_choice="none")
    assert answer.choices[0].message.content == CALL
    assert TOKENIZER.decode(backend.requests[0].prompt_ids) == "<user>hi<assistant>"


async def test_a_strict_tool_may_be_left_alone_but_not_called_wrongly(
    openai: AsyncOpenAI, random_model: StubBackend
) -> None:
    strict = {"type": "function", "function": {**LOOK["function"], "strict": True}}
    answer = await openai.chat.completions.create(**CHAT, tools=[strict, WAIT], max_tokens=20)
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert random_model.requests[0].sampling.grammar.kind == "tools"


async def test_a_conversation_with_calls_and_results_is_told_in_words_to_a_plain_template(
    openai: AsyncOpenAI, backend: StubBackend
) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"x":1}'}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "a reef"},
    ]
    await openai.chat.completions.create(model="shoal-tiny", messages=messages, tools=[LOOK])
    prompt = TOKENIZER.decode(backend.requests[0].prompt_ids)
    assert prompt.startswith("<system>You can call these functions:")
    assert '"name": "look"' in prompt.partition("</tools>")[0]
    assert prompt.endswith(
        '<user>hi<assistant><tool_call>\n{"name": "look", "arguments": {"x": 1}}\n</tool_call>'
        "<user><tool_response>\na reef\n</tool_response><assistant>"
    )


async def test_a_template_that_knows_tools_gets_them_as_they_are(
    openai: AsyncOpenAI, backend: StubBackend
) -> None:
    template = (
        "{% for t in tools %}[{{ t | tojson }}]{% endfor %}{% for m in messages %}<{{ m.role }}>"
        "{% for c in m.tool_calls %}{{ c.function.arguments.x }}{% endfor %}"
        "{{ m.name }}{{ m.content }}{% endfor %} <tool_call>"
    )
    inner = byte_tokenizer()._inner
    knows = Tokenizer(inner, eos_ids=(256,), templates={"default": ChatTemplate(template, {})})
    backend.model = replace(backend.model, tokenizer=knows)
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"x":1}'}}
    messages = [
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "!"},
    ]
    await openai.chat.completions.create(model="shoal-tiny", messages=messages, tools=[WAIT])
    assert knows.decode(backend.requests[0].prompt_ids) == (
        '[{"type": "function", "function": {"name": "wait", "description": "Do nothing."}}]'
        "<assistant>1<tool>look! <tool_call>"
    )


@pytest.mark.parametrize(
    ("template", "dialect"),
    [
        ("{{ messages }}", GENERIC),
        ("{{ tools }} <tool_call>", HERMES),
        ("{{ tools }} <tool_call><function=f>", GENERIC),
        ("{{ tools }} [TOOL_CALLS]", MISTRAL),
        ("{{ tools }} [TOOL_CALLS]f[ARGS]{}", GENERIC),
        ("{{ tools }} <|python_tag|>", LLAMA),
        ('{{ tools }} {"name": x, "parameters": y}', LLAMA),
        ("{{ tools }} in a way of its own", GENERIC),
    ],
)
async def test_a_dialect_is_recognised_by_the_template(template: str, dialect: Dialect) -> None:
    chat = ChatTemplate(template, {})
    assert dialect_of(Tokenizer(TOKENIZER._inner, templates={"default": chat})) == dialect


async def test_a_marker_that_is_a_special_token_is_seen(
    openai: AsyncOpenAI, backend: StubBackend
) -> None:
    inner = byte_tokenizer()._inner
    inner.add_special_tokens(["[TOOL_CALLS]"])
    template = ChatTemplate("{{ tools }}{{ messages }}[TOOL_CALLS]", {})
    speech = Tokenizer(inner, eos_ids=(256,), templates={"default": template})
    backend.model = replace(backend.model, tokenizer=speech)
    backend.text = '[TOOL_CALLS] [{"name": "look", "arguments": {"x": 2}}]'
    answer = await openai.chat.completions.create(
        **CHAT, tools=[LOOK], tool_choice="required", max_tokens=200
    )
    rules = json.loads(backend.requests[0].sampling.grammar.text)
    assert rules["begin_token"] == 257
    assert answer.choices[0].message.tool_calls[0].function.arguments == '{"x": 2}'
