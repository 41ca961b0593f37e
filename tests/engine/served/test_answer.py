"""Bytes of an answer, cut anywhere, become tokens; what is no answer is an error of the engine."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.engine.request import Grammar, Sampled, Sampling, TokenLogprob
from shoal.engine.served.answer import MAX_EVENT_BYTES, Answer, EventLines
from shoal.engine.served.dialect import Dialect, Job
from shoal.engine.served.ids import IdsDialect, IdsReader
from shoal.engine.served.llama import LlamaDialect, LlamaReader
from shoal.engine.served.retokenise import Retokeniser
from shoal.engine.served.text import TextDialect, TextReader
from shoal.errors import BackendFailed
from shoal.models.checkpoint import BUILTIN_FOLDER
from shoal.models.text import Tokenizer

END = 0
TOKENIZER = Tokenizer.open(BUILTIN_FOLDER)


def sse(event: object) -> bytes:
    return b"data: " + json.dumps(event).encode() + b"\n\n"


@given(st.lists(st.text(max_size=9), max_size=6), st.integers(min_value=1, max_value=17))
def test_events_survive_any_cut(texts: list[str], size: int) -> None:
    wire = b": comment\n" + b"".join(sse({"text": text}) for text in texts) + b"data: [DONE]\n\n"
    lines = EventLines()
    pieces = [wire[at : at + size] for at in range(0, len(wire), size)]
    assert [event["text"] for part in pieces for event in lines.receive(part)] == texts


@pytest.mark.parametrize("wire", [b"data: [1]\n", b"data: {\n", b"data: " + b"[" * 5000 + b"\n"])
def test_what_is_no_event_is_the_engines_failure(wire: bytes) -> None:
    with pytest.raises(BackendFailed, match="no JSON object"):
        EventLines().receive(wire)


def test_an_endless_line_is_given_up() -> None:
    lines = EventLines()
    assert lines.receive(b"x" * MAX_EVENT_BYTES) == []
    with pytest.raises(BackendFailed, match="bytes"):
        lines.receive(b"x")


def asked(**settings: object) -> Job:
    usual = {"max_tokens": 4, "stop_ids": (END,)}
    return Job([5, 6], [], Sampling(**{**usual, **settings}))  # type: ignore[arg-type]


def ids_event(*ids: int, finish: str | None = None, **more: object) -> dict:
    choice = {"text": "", "token_ids": list(ids), "finish_reason": finish, **more}
    return {"choices": [choice]}


def test_an_answer_ends_at_a_stop_id_whatever_the_engine_sends_after_it() -> None:
    answer = Answer(asked(), IdsReader(), END)
    assert answer.take(ids_event(7, END, 8)) == [Sampled(7), Sampled(END, "stop")]
    assert answer.over


def test_an_answer_is_no_longer_than_asked_for() -> None:
    answer = Answer(asked(max_tokens=2), IdsReader(), END)
    assert answer.take(ids_event(7, 8, 9)) == [Sampled(7), Sampled(8, "length")]


def test_an_end_without_a_token_gets_one_that_writes_nothing() -> None:
    answer = Answer(asked(), IdsReader(), END)
    assert answer.take(ids_event(7)) == [Sampled(7)]
    assert answer.take(ids_event(finish="stop")) == [Sampled(END, "stop")]


@pytest.mark.parametrize(
    "event",
    [
        {"choices": 3},
        {"choices": [{"token_ids": ["7"]}]},
        {"choices": [{"token_ids": [-1]}]},
        {"choices": [{"token_ids": [7], "logprobs": {"token_logprobs": ["x"]}}]},
        {"choices": [{"finish_reason": "abort"}]},
        {"error": {"message": "out of memory"}},
        {"object": "error", "message": "out of memory"},
    ],
)
def test_a_broken_answer_is_the_engines_failure(event: dict) -> None:
    with pytest.raises(BackendFailed):
        Answer(asked(logprobs=1), IdsReader(), END).take(event)


def test_half_a_character_of_the_engine_is_its_failure() -> None:
    answer = Answer(asked(), TextReader(Retokeniser(TOKENIZER)), END)
    with pytest.raises(BackendFailed):
        answer.take({"choices": [{"text": "\ud800"}]})


def test_a_gap_in_the_ids_of_llama_cpp_is_filled_from_its_text() -> None:
    reader = LlamaReader(Retokeniser(TOKENIZER))
    last = TOKENIZER.encode("€")[-1]
    event = {"content": "€", "tokens": [last], "tokens_predicted": 3, "stop": False}
    assert [one.token for one in reader.read(event).tokens] == TOKENIZER.encode("€")


@given(st.text(max_size=40), st.integers(min_value=1, max_value=7))
def test_ids_made_from_text_write_the_same_text(text: str, size: int) -> None:
    retokeniser = Retokeniser(TOKENIZER)
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    ids = [token for piece in pieces for token in retokeniser.ids(piece)]
    assert TOKENIZER.decode(ids) == text
    assert END not in ids


def test_words_that_look_like_special_tokens_stay_words() -> None:
    ids = Retokeniser(TOKENIZER).ids("<|endoftext|>")
    assert TOKENIZER.decode(ids) == "<|endoftext|>"


def dialects() -> list[Dialect]:
    text = TextDialect(
        "some server", "m", TOKENIZER, extra={}, no_top_k=-1, adds_bos=False, takes_ids=False
    )
    return [LlamaDialect(Retokeniser(TOKENIZER), (END,)), IdsDialect("vLLM", "m", (END,)), text]


def test_what_an_engine_cannot_do_is_refused_by_name() -> None:
    llama, vllm, text = dialects()
    for dialect in (llama, vllm):
        assert dialect.refuses(asked(top_k=4, logprobs=3, stop_ids=(END, 9)).sampling) == ""
    assert text.refuses(asked().sampling) == ""
    assert "logprobs, top_k" in text.refuses(asked(top_k=4, logprobs=3).sampling)
    assert "stop_token_ids" in text.refuses(asked(stop_ids=(END, 9)).sampling)
    json, tools = Grammar("json_object"), Grammar("tools")
    assert llama.refuses(asked(grammar=json).sampling) == ""
    assert "tools" in llama.refuses(asked(grammar=tools).sampling)
    for schema in ("", "3", "{", "[" * 9000):
        wild = asked(grammar=Grammar("json_schema", schema)).sampling
        assert "no JSON object" in llama.refuses(wild)
    for dialect in (vllm, text):
        assert "grammar" in dialect.refuses(asked(grammar=json).sampling)


def test_settings_are_told_in_the_engines_own_words() -> None:
    job = asked(temperature=0.5, top_k=3, repetition_penalty=1.2, logit_bias={7: 2.0}, logprobs=0)
    llama, vllm, text = (dialect.body(job) for dialect in dialects())
    assert (llama["repeat_penalty"], llama["top_k"], llama["n_probs"]) == (1.2, 3, 1)
    assert llama["logit_bias"] == [[7, 2.0]]
    assert not llama["ignore_eos"]
    assert (vllm["repetition_penalty"], vllm["top_k"], vllm["logprobs"]) == (1.2, 3, 0)
    assert vllm["logit_bias"] == text["logit_bias"] == {"7": 2.0}
    assert vllm["prompt"] == [5, 6]
    assert text["prompt"] == TOKENIZER.written([5, 6])


def test_an_answer_that_must_not_end_is_told_so() -> None:
    llama, vllm, text = (dialect.body(asked(stop_ids=())) for dialect in dialects())
    assert llama["ignore_eos"]
    assert vllm["ignore_eos"]
    assert text["logit_bias"] == {str(END): -100.0}


def test_vllms_logprobs_are_read() -> None:
    told = {"token_logprobs": [-0.5], "top_logprobs": [{"token_id:9": -0.2, "token_id:7": -0.5}]}
    taken = Answer(asked(logprobs=1), IdsReader(), END).take(ids_event(7, logprobs=told))
    assert taken == [Sampled(7, "", -0.5, (TokenLogprob(9, -0.2),))]
