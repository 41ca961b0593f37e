"""The official client, unchanged, against a server on a real socket."""

from __future__ import annotations

import openai as openai_package
import pytest
from openai import AsyncOpenAI

from shoal.api import ServedModel
from shoal.errors import NoRoute, Overloaded, StageLost

from .stub import TOKENIZER, StubBackend

pytestmark = pytest.mark.anyio

CHAT = {"model": "shoal-tiny", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "shoal-tiny", "prompt": "hi"}


async def test_a_chat_is_answered(openai: AsyncOpenAI, backend: StubBackend) -> None:
    answer = await openai.chat.completions.create(**CHAT)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "shoal-tiny"
    assert answer.system_fingerprint == "fp_stub"
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
    assert (choice.message.role, choice.message.content) == ("assistant", "Hello, world")
    prompt = len("<user>hi<assistant>")
    assert answer.usage.prompt_tokens == prompt
    assert answer.usage.completion_tokens == len("Hello, world") + 1
    assert answer.usage.total_tokens == prompt + len("Hello, world") + 1


async def test_a_chat_is_streamed_with_its_usage_last(openai: AsyncOpenAI) -> None:
    stream = await openai.chat.completions.create(
        **CHAT, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == "Hello, world"
    reasons = [c.choices[0].finish_reason for c in chunks[:-1]]
    assert reasons == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len("Hello, world") + 1
    assert all(chunk.usage is None and "usage" in chunk.model_fields_set for chunk in chunks[:-1])


async def test_a_stream_says_nothing_of_usage_unasked(openai: AsyncOpenAI) -> None:
    stream = await openai.chat.completions.create(**CHAT, stream=True)
    assert not [chunk async for chunk in stream if "usage" in chunk.model_fields_set]


async def test_a_prompt_is_completed(openai: AsyncOpenAI) -> None:
    answer = await openai.completions.create(**TEXT)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.choices[0].text == "Hello, world"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == 2


async def test_a_completion_is_streamed(openai: AsyncOpenAI) -> None:
    stream = await openai.completions.create(**TEXT, stream=True, echo=True)
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "hiHello, world"
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_several_prompts_get_n_answers_each(
    openai: AsyncOpenAI, backend: StubBackend
) -> None:
    a, b = TOKENIZER.encode("a"), TOKENIZER.encode("b")
    names = {tuple(a): "A", tuple(b): "B"}
    backend.text_for = lambda request: names[request.prompt_ids] + str(request.sampling.seed)
    for prompt in (["a", "b"], [a, b]):
        answer = await openai.completions.create(model="shoal-tiny", prompt=prompt, n=2, seed=5)
        assert [c.text for c in answer.choices] == ["A5", "A6", "B5", "B6"]
        assert [c.index for c in answer.choices] == [0, 1, 2, 3]
        assert answer.usage.prompt_tokens == 2
        assert answer.usage.completion_tokens == 12


async def test_token_ids_are_a_prompt(openai: AsyncOpenAI, backend: StubBackend) -> None:
    await openai.completions.create(model="shoal-tiny", prompt=[1, 2, 3])
    assert backend.requests[0].prompt_ids == (1, 2, 3)


async def test_echo_repeats_the_prompt(openai: AsyncOpenAI, backend: StubBackend) -> None:
    answer = await openai.completions.create(**TEXT, echo=True)
    assert answer.choices[0].text == "hiHello, world"


async def test_n_streamed_choices_keep_apart(openai: AsyncOpenAI, backend: StubBackend) -> None:
    backend.text_for = lambda request: "x" * (request.sampling.seed - 6)
    stream = await openai.chat.completions.create(**CHAT, n=3, seed=7, stream=True)
    texts, finished = ["", "", ""], []
    async for chunk in stream:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            finished.append(choice.index)
    assert texts == ["x", "xx", "xxx"]
    assert sorted(finished) == [0, 1, 2]


async def test_a_stop_string_cuts_across_tokens(openai: AsyncOpenAI, backend: StubBackend) -> None:
    answer = await openai.chat.completions.create(**CHAT, stop=["lo, w"], logprobs=True)
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == ("Hel", "stop")
    assert "".join(token.token for token in choice.logprobs.content) == "Hel"
    assert answer.usage.completion_tokens == len("Hello, w")
    assert backend.generations[0].closed.is_set()


async def test_a_stop_string_never_shows_in_a_stream(openai: AsyncOpenAI) -> None:
    stream = await openai.chat.completions.create(**CHAT, stop="world", stream=True)
    chunks = [chunk.choices[0] async for chunk in stream]
    assert "".join(choice.delta.content or "" for choice in chunks) == "Hello, "
    assert chunks[-1].finish_reason == "stop"


async def test_what_may_begin_a_stop_string_comes_out_at_the_end(openai: AsyncOpenAI) -> None:
    answer = await openai.chat.completions.create(**CHAT, stop=["ld!"], logprobs=True)
    assert answer.choices[0].message.content == "Hello, world"
    assert len(answer.choices[0].logprobs.content) == len("Hello, world")


async def test_max_tokens_ends_with_length(openai: AsyncOpenAI) -> None:
    for limit in ({"max_tokens": 4}, {"max_completion_tokens": 4, "max_tokens": 9}):
        answer = await openai.chat.completions.create(**CHAT, **limit)
        assert answer.choices[0].message.content == "Hell"
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 4


async def test_half_a_character_at_the_end_is_shown_as_such(
    openai: AsyncOpenAI, backend: StubBackend
) -> None:
    backend.text = "aé"
    answer = await openai.chat.completions.create(**CHAT, max_tokens=2, logprobs=True)
    assert answer.choices[0].message.content == "a�"
    assert [token.bytes for token in answer.choices[0].logprobs.content] == [[97], [0xC3]]


async def test_chat_logprobs_carry_bytes_and_alternatives(
    openai: AsyncOpenAI, backend: StubBackend
) -> None:
    backend.text = "é!"
    answer = await openai.chat.completions.create(**CHAT, logprobs=True, top_logprobs=2)
    first, second, third = answer.choices[0].logprobs.content
    assert first.bytes + second.bytes == list("é".encode())
    assert third.token == "!"
    assert third.logprob == -0.5
    assert [other.logprob for other in third.top_logprobs] == [-0.5, -1.5]
    assert third.top_logprobs[0].token == "!"


async def test_streamed_logprobs_are_those_of_the_whole_answer(openai: AsyncOpenAI) -> None:
    wish = {"logprobs": True, "top_logprobs": 1, "stop": "rl"}
    whole = await openai.chat.completions.create(**CHAT, **wish)
    stream = await openai.chat.completions.create(**CHAT, **wish, stream=True)
    tokens = [
        token
        async for chunk in stream
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert tokens == whole.choices[0].logprobs.content


async def test_completion_logprobs_have_offsets(openai: AsyncOpenAI) -> None:
    answer = await openai.completions.create(**TEXT, max_tokens=3, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs.tokens == ["H", "e", "l"]
    assert logprobs.token_logprobs == [-0.5, -0.5, -0.5]
    assert logprobs.text_offset == [0, 1, 2]
    assert [top[token] for top, token in zip(logprobs.top_logprobs, "Hel", strict=True)] == [
        -0.5
    ] * 3
    assert [len(top) for top in logprobs.top_logprobs] == [2, 2, 2]


async def test_the_sampler_gets_what_was_asked(openai: AsyncOpenAI, backend: StubBackend) -> None:
    await openai.chat.completions.create(
        **CHAT,
        temperature=0.5,
        top_p=0.9,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        seed=-1,
        logit_bias={"5": 3},
        extra_body={
            "top_k": 7,
            "min_p": 0.05,
            "repetition_penalty": 1.1,
            "stop_token_ids": [9],
            "an_unknown_field": [1],
        },
    )
    sampling = backend.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 7)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.05, 1.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.1, 0.2)
    assert sampling.seed == (1 << 63) - 1
    assert sampling.logit_bias == {5: 3.0}
    assert sampling.stop_ids == (256, 9)
    assert sampling.max_tokens == 64 - len("<user>hi<assistant>")


async def test_ignore_eos_goes_on_to_the_limit(openai: AsyncOpenAI, backend: StubBackend) -> None:
    answer = await openai.chat.completions.create(
        **CHAT, max_tokens=13, extra_body={"ignore_eos": True}
    )
    assert backend.requests[0].sampling.stop_ids == ()
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.content == "Hello, world"


async def test_each_request_without_a_seed_has_its_own(
    openai: AsyncOpenAI, backend: StubBackend
) -> None:
    for _ in range(3):
        await openai.chat.completions.create(**CHAT)
    assert len({request.sampling.seed for request in backend.requests}) == 3


async def test_text_parts_are_one_text(openai: AsyncOpenAI, backend: StubBackend) -> None:
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    await openai.chat.completions.create(
        model="shoal-tiny", messages=[{"role": "developer", "content": parts}]
    )
    prompt = TOKENIZER.decode(backend.requests[0].prompt_ids)
    assert prompt == "<system>hi<assistant>"


async def test_models_are_listed(openai: AsyncOpenAI, backend: StubBackend) -> None:
    (listed,) = (await openai.models.list()).data
    assert listed == await openai.models.retrieve("shoal-tiny")
    assert (listed.id, listed.object, listed.owned_by) == ("shoal-tiny", "model", "shoal")


async def test_a_model_name_may_hold_a_slash(openai: AsyncOpenAI, backend: StubBackend) -> None:
    backend.model = ServedModel("Qwen/Qwen3-8B", 0, 64, True, None, "fp")
    assert (await openai.models.retrieve("Qwen/Qwen3-8B")).id == "Qwen/Qwen3-8B"


async def test_an_unknown_model_is_not_found(openai: AsyncOpenAI) -> None:
    with pytest.raises(openai_package.NotFoundError) as caught:
        await openai.chat.completions.create(model="gpt-9", messages=CHAT["messages"])
    assert caught.value.code == "model_not_found"
    assert caught.value.type == "not_found_error"
    assert "use shoal-tiny" in caught.value.message
    assert caught.value.request_id
    with pytest.raises(openai_package.NotFoundError):
        await openai.models.retrieve("gpt-9")


async def test_a_prompt_too_long_says_how_long_is_allowed(openai: AsyncOpenAI) -> None:
    with pytest.raises(openai_package.BadRequestError) as caught:
        await openai.completions.create(model="shoal-tiny", prompt="x" * 64)
    assert caught.value.code == "context_length_exceeded"
    assert "has 64 tokens" in caught.value.message
    assert "at most 63" in caught.value.message


async def test_a_full_queue_asks_to_come_back(openai: AsyncOpenAI, backend: StubBackend) -> None:
    backend.refusal = Overloaded("the queue is full", retry_after_s=2.5)
    for stream in (False, True):
        with pytest.raises(openai_package.RateLimitError) as caught:
            await openai.chat.completions.create(**CHAT, stream=stream)
        assert caught.value.response.headers["retry-after"] == "3"
        assert caught.value.type == "rate_limit_error"


@pytest.mark.parametrize("when", ["generate", "first token"])
async def test_no_route_is_a_503_even_for_a_stream(
    openai: AsyncOpenAI, backend: StubBackend, when: str
) -> None:
    error = NoRoute("nobody holds layers 4:8")
    backend.refusal = error if when == "generate" else None
    backend.failure = error
    for stream in (False, True):
        with pytest.raises(openai_package.InternalServerError) as caught:
            await openai.chat.completions.create(**CHAT, stream=stream)
        assert caught.value.status_code == 503
        assert caught.value.code == "no_route"
        assert "retry-after" in caught.value.response.headers


async def test_a_lost_stage_ends_a_stream_with_its_error(
    openai: AsyncOpenAI, backend: StubBackend
) -> None:
    backend.failure, backend.fails_at = StageLost("still-lake is gone"), 4
    stream = await openai.chat.completions.create(**CHAT, stream=True)
    heard: list[str | None] = []

    async def listen() -> None:
        async for chunk in stream:
            heard.append(chunk.choices[0].delta.content)

    with pytest.raises(openai_package.APIError, match="still-lake is gone") as caught:
        await listen()
    assert heard == ["", "H", "e", "l"]
    assert caught.value.code == "stage_lost"
    assert backend.generations[0].closed.is_set()


async def test_one_failing_choice_ends_all_with_one_error(
    openai: AsyncOpenAI, backend: StubBackend
) -> None:
    backend.failure, backend.fails_at = StageLost("still-lake is gone"), 4
    with pytest.raises(openai_package.InternalServerError, match="still-lake is gone") as caught:
        await openai.chat.completions.create(**CHAT, n=4)
    assert caught.value.status_code == 502
    assert len(backend.generations) == 4
    assert all(generation.closed.is_set() for generation in backend.generations)


async def test_a_generation_that_ends_without_a_reason_is_an_error(
    openai: AsyncOpenAI, backend: StubBackend
) -> None:
    with pytest.raises(openai_package.InternalServerError, match="without saying why"):
        await openai.chat.completions.create(**CHAT, max_tokens=30, extra_body={"ignore_eos": True})
