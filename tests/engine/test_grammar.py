from __future__ import annotations

import json
import threading
from typing import Any

import jsonschema
import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engine.grammar import COMPILED_GRAMMARS, Grammars
from shoal.engine.grammar_source import Tool, ToolRules
from shoal.engine.request import (
    MAX_BIASED_TOKENS,
    MAX_GRAMMAR_BYTES,
    MAX_STOP_TOKENS,
    Grammar,
    Sampled,
    Sampling,
)
from shoal.engine.sampling import Samplers, SamplerState, sample, verify
from shoal.errors import InvalidRequest, Overloaded
from shoal.models.checkpoint import open_checkpoint
from shoal.models.text import Tokenizer
from shoal.transport import FrameLimits

CHECKPOINT = open_checkpoint("shoal-tiny")
TOKENIZER = Tokenizer.open(CHECKPOINT.folder)
VOCABULARY = CHECKPOINT.vocab_size
GRAMMARS = Grammars.of(TOKENIZER, VOCABULARY)
PATIENCE_S = 20  # for compilations, on a machine that is busy with other tests
BYTES = Grammars.of_bytes()

POINT = {
    "type": "object",
    "properties": {
        "x": {"type": "integer", "minimum": 0, "maximum": 99},
        "on": {"type": "boolean"},
    },
    "required": ["x", "on"],
    "additionalProperties": False,
}
leaves = st.sampled_from(
    [
        {"type": "integer", "minimum": -5, "maximum": 500},
        {"type": "string", "maxLength": 8},
        {"type": "string", "pattern": "^[a-c]{2,4}-[0-9]$"},
        {"type": "boolean"},
        {"type": "null"},
        {"enum": ["red", "gr\u00fcn", 3, None]},
        {"type": "string", "format": "date"},
        {"$ref": "#/$defs/point"},
    ]
)
schemas = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(lambda items: {"type": "array", "items": items, "maxItems": 3}, inner),
        st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(
            lambda properties, need: {
                "type": "object",
                "properties": properties,
                "required": sorted(properties)[:need],
                "additionalProperties": False,
            },
            st.dictionaries(st.sampled_from(["a", "b c", "d\u00e9", "e"]), inner, max_size=4),
            st.integers(0, 4),
        ),
    ),
    max_leaves=6,
).map(lambda schema: {**schema, "$defs": {"point": POINT}})


def schema(content: dict[str, Any]) -> Grammar:
    return Grammar("json_schema", json.dumps(content))


def state(grammar: Grammar | None, output: list[int] | None = None, **wanted: Any) -> SamplerState:
    settings = {"max_tokens": 400, "stop_ids": TOKENIZER.eos_ids} | wanted
    matcher = GRAMMARS.matcher(grammar, PATIENCE_S) if grammar else None
    return SamplerState(Sampling(grammar=grammar, **settings), (), output or (), matcher)


def logits_at(seed: int, position: int) -> torch.Tensor:
    chance = torch.Generator().manual_seed(1000 * seed + position)
    return torch.randn(1, VOCABULARY, generator=chance) * 3


def written(state: SamplerState, seed: int = 0, limit: int = 1000) -> list[Sampled]:
    out: list[Sampled] = []
    while len(out) < limit and not (out and out[-1].finish):
        out += sample(logits_at(seed, state.position), [state])
    return out


def ids(out: list[Sampled]) -> list[int]:
    return [each.token for each in out]


@settings(max_examples=40, deadline=None)
@given(schemas, st.integers(0, 99), st.sampled_from([0.0, 1.0]))
def test_whatever_the_model_says_is_json_of_the_schema(
    content: dict[str, Any], seed: int, temperature: float
) -> None:
    out = written(state(schema(content), temperature=temperature, seed=seed), seed)
    assert out[-1].finish == "stop"
    jsonschema.validate(json.loads(TOKENIZER.decode(ids(out))), content)


@settings(max_examples=10, deadline=None)
@given(schemas, st.integers(0, 99), st.integers(1, 30))
def test_a_restart_goes_on_with_the_same_tokens(
    content: dict[str, Any], seed: int, cut: int
) -> None:
    whole = written(state(schema(content), seed=seed), seed)
    head = ids(whole[:-1])[:cut]
    rest = written(state(schema(content), output=head, seed=seed), seed)
    assert head + ids(rest) == ids(whole)


def test_a_json_object_is_any_object() -> None:
    for seed in range(5):
        out = written(state(Grammar("json_object"), seed=seed), seed, limit=60)
        text = TOKENIZER.decode(ids(out)).lstrip()
        assert text.startswith("{")
        if out[-1].finish == "stop":
            assert isinstance(json.loads(text), dict)


def test_max_tokens_cut_a_constrained_text_and_say_so() -> None:
    out = written(state(schema(POINT), max_tokens=4))
    assert (len(out), out[-1].finish) == (4, "length")


def test_the_end_is_forced_when_the_grammar_is_at_its_end_even_if_ends_are_ignored() -> None:
    constant = schema({"const": 7})
    for stop_ids in (TOKENIZER.eos_ids, ()):
        out = written(state(constant, stop_ids=stop_ids))
        assert TOKENIZER.decode(ids(out)) == "7"
        assert (out[-1].token, out[-1].finish) == (TOKENIZER.eos_ids[0], "stop")


def test_bias_and_penalties_cannot_break_the_grammar_and_logprobs_stay_raw() -> None:
    wrong = TOKENIZER.encode("hello")[0]
    wanted = {"logit_bias": {wrong: 100.0}, "presence_penalty": 2.0, "repetition_penalty": 2.0}
    out = written(state(schema(POINT), logprobs=2, **wanted))
    jsonschema.validate(json.loads(TOKENIZER.decode(ids(out))), POINT)
    raw = torch.log_softmax(logits_at(0, 0)[0].double(), -1)
    assert out[0].logprob == pytest.approx(float(raw[out[0].token]), abs=1e-4)
    assert [each.token for each in out[0].top] == raw.topk(2).indices.tolist()


@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_p": 0.1}, {"min_p": 0.5}, {"top_k": 4000}])
def test_filters_choose_among_what_is_allowed(filters: dict[str, Any]) -> None:
    out = written(state(schema(POINT), seed=3, **filters), 3)
    jsonschema.validate(json.loads(TOKENIZER.decode(ids(out))), POINT)


def test_rows_without_a_grammar_beside_one_with_it_choose_what_they_would_alone() -> None:
    logits = torch.cat([logits_at(1, 0), logits_at(1, 0), logits_at(1, 0)])
    mixed = sample(logits, [state(None, seed=1), state(schema(POINT), seed=1), state(None, seed=1)])
    alone = sample(logits[:1], [state(None, seed=1)])[0]
    held = sample(logits[:1], [state(schema(POINT), seed=1)])[0]
    assert mixed == [alone, held, alone]


def test_a_row_of_nan_still_writes_the_grammar() -> None:
    one = state(schema({"const": "ab"}))
    out: list[Sampled] = []
    while not out or not out[-1].finish:
        out += sample(torch.full((1, VOCABULARY), float("nan")), [one])
    assert json.loads(TOKENIZER.decode(ids(out))) == "ab"


def test_a_text_outside_the_grammar_is_cut_and_not_said_to_be_whole() -> None:
    one = state(schema(POINT), output=TOKENIZER.encode("hello"))
    (cut,) = sample(logits_at(0, 1), [one])
    assert (cut.token, cut.finish) == (TOKENIZER.eos_ids[0], "length")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"type": "strin"}, "strin"),
        ({"not": {"type": "string"}}, "not"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "string", "pattern": "(" * 5000 + "a" + ")" * 5000}, "regex"),
        ({"$ref": "http://127.0.0.1:1/x.json"}, "127.0.0.1"),
        ({"$ref": "file:///etc/passwd"}, "passwd"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "nsatisfiable"),
        ({"allOf": [{"type": "integer", "multipleOf": n} for n in (9973, 9967)]}, "multipleOf"),
        ({"type": "number", "multipleOf": 1e-300}, "multipleOf"),
        ({"$ref": "#"}, "cannot be used"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#"}}}, "cannot be used"),
        ({"type": "integer", "multipleOf": 10**18}, "multipleOf"),
        ({"properties": {f"p{i}": {} for i in range(501)}}, "501 properties"),
        (
            {"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {}}} for j in range(6)]}
                       for i in range(12)]},
            "too large",
        ),
    ],
)  # fmt: skip
def test_a_schema_that_cannot_be_used_is_refused_in_words(
    content: dict[str, Any], says: str
) -> None:
    with pytest.raises(InvalidRequest, match=says):
        BYTES.matcher(schema(content), PATIENCE_S)


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 5000, '{"a":' * 5000, "nul"])
def test_what_is_no_schema_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        BYTES.matcher(Grammar("json_schema", text), PATIENCE_S)
    with pytest.raises(InvalidRequest):
        BYTES.matcher(Grammar("tools", text), PATIENCE_S)


@pytest.mark.parametrize("pattern", ["^(a{1000}){1000}$", "^(.|\n)*a(.|\n){200}b(.|\n){200}$"])
def test_a_pattern_that_outgrows_its_limits_ends_its_own_text_alone(pattern: str) -> None:
    bad, good = schema({"type": "string", "pattern": pattern}), schema({"const": [1, 2]})
    states = [state(bad), state(good)]
    ends: list[list[Sampled]] = [[], []]
    for position in range(300):
        going = [i for i in (0, 1) if not (ends[i] and ends[i][-1].finish)]
        for i, one in zip(
            going,
            sample(logits_at(2, position).expand(len(going), -1), [states[i] for i in going]),
            strict=True,
        ):
            ends[i].append(one)
    assert ends[0][-1].finish == "length"
    assert json.loads(TOKENIZER.decode(ids(ends[1]))) == [1, 2]


def test_a_grammar_is_bounded_in_size_whoever_sends_it() -> None:
    with pytest.raises(ValueError, match="grammar"):
        Grammar("json_schema", "x" * (MAX_GRAMMAR_BYTES + 1))
    raw = msgspec.msgpack.encode({"kind": "json_schema", "text": "\u00e9" * MAX_GRAMMAR_BYTES})
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(raw, type=Grammar)


def test_who_does_not_wait_for_a_compilation_finds_it_done_the_next_time() -> None:
    slow, allow = Grammars.of_bytes(), threading.Event()
    compile_now = slow._compile
    slow._compile = lambda *all: allow.wait() and compile_now(*all)  # type: ignore[method-assign]
    one, other = schema({"const": 1}), schema({"const": 2})
    with pytest.raises(Overloaded, match="longer"):
        slow.matcher(one, patience_s=0)
    with pytest.raises(Overloaded, match="longer"):
        slow.matcher(other, patience_s=0)
    with pytest.raises(Overloaded, match="too many"):
        slow.matcher(schema({"const": 3}), patience_s=0)
    allow.set()
    for _ in range(2):
        assert slow._compilers.acquire(timeout=5)
    assert slow.matcher(one, patience_s=0).allowed()
    assert slow.matcher(other, patience_s=0).allowed()


def test_grammars_that_nobody_asks_for_are_forgotten() -> None:
    fresh = Grammars.of_bytes()
    for number in range(COMPILED_GRAMMARS + 5):
        fresh.matcher(schema({"const": number}), PATIENCE_S)
        fresh.matcher(schema({"const": 0}), PATIENCE_S)
    assert len(fresh._compiled) == COMPILED_GRAMMARS
    assert schema({"const": 0}) in fresh._compiled
    assert schema({"const": 1}) not in fresh._compiled


def test_the_largest_settings_fit_into_a_header_of_a_frame() -> None:
    largest = Sampling(
        logit_bias={(1 << 32) - 1 - n: -99.9 for n in range(MAX_BIASED_TOKENS)},
        stop_ids=tuple((1 << 32) - 1 - n for n in range(MAX_STOP_TOKENS)),
        grammar=Grammar("json_schema", "x" * MAX_GRAMMAR_BYTES),
    )
    assert len(msgspec.msgpack.encode(largest)) + 2000 < FrameLimits().max_header_bytes


def test_a_draft_is_verified_under_the_grammar() -> None:
    whole = written(state(schema(POINT), seed=4), 4)
    logits = torch.cat([logits_at(4, position) for position in range(len(whole))])
    for draft in (ids(whole)[:-1], [*ids(whole)[:3], 77, *ids(whole)[4:-1]]):
        (verified,) = verify(logits, [state(schema(POINT), seed=4)], [draft])
        assert list(verified) == whole[: len(verified)]
    assert len(verified) == 4


def test_a_model_without_an_end_token_has_no_grammars() -> None:
    with pytest.raises(InvalidRequest, match="end token"):
        Grammars.of(Tokenizer(TOKENIZER._inner), VOCABULARY)
    assert Samplers(GRAMMARS)(Sampling(), ()).matcher is None
    why = Samplers(InvalidRequest("none here"))
    with pytest.raises(InvalidRequest, match="none here"):
        why(Sampling(grammar=Grammar("json_object")), ())
    assert why(Sampling(), ()).is_plain is False


# ---- calls of tools

MOVE = Tool("move", {"type": "object", "properties": {"to": {"$ref": "#/$defs/point"}},
                     "required": ["to"], "additionalProperties": False,
                     "$defs": {"point": POINT}})  # fmt: skip
WAIT = Tool("wait", True)
CALL = b'{"name": "move", "arguments": {"to":{"x":5,"on":true}}}'


def accepts(rules: ToolRules, text: bytes) -> bool:
    """True when `text` may be written and may end there."""
    grammar = Grammar("tools", msgspec.json.encode(rules).decode())
    matcher = BYTES.matcher(grammar, PATIENCE_S)
    for token in (*text, 256):
        matcher.take(token)
    return matcher.ended


@pytest.mark.parametrize(
    ("rules", "good", "bad"),
    [
        (
            {"begin": "<t>", "end": "</t>", "gap": "\n"},
            [b"<t>\n" + CALL + b"\n</t>", b"<t>\n" + CALL + b"\n</t>\n<t>\n" + CALL + b"\n</t>"],
            [b"", b"hi", CALL, b"<t>\n" + CALL, b"<t>\n" + CALL.replace(b"5", b"500") + b"\n</t>"],
        ),
        (
            {"begin": "<t>", "end": "</t>", "several": False},
            [b"<t>" + CALL + b"</t>"],
            [b"<t>" + CALL + b"</t>\n<t>" + CALL + b"</t>"],
        ),
        (
            {"begin": "<t>", "end": "</t>", "free_text": True},
            [b"", b"a < b", b"so: <t>" + CALL + b"</t>", b"<t>" + CALL + b"</t> and"],
            [b"<t>", b"so <t>{}</t>"],
        ),
        ({"free_text": True}, [b"", b"hello {", CALL], [b"{", b"{}"]),
        (
            {"begin": "A", "begin_token": 9, "as_list": True},
            [b"A[" + CALL + b", " + CALL + b"]"],
            [b"A[]"],
        ),
        ({"begin": "A", "as_list": True, "several": False}, [b"A[" + CALL + b"]"], [CALL]),
        ({"several": False}, [CALL, b'{"name": "wait", "arguments": [1]}'], [b"", b"x" + CALL]),
    ],
)
def test_calls_are_written_as_the_rules_say(
    rules: dict[str, Any], good: list[bytes], bad: list[bytes]
) -> None:
    for text in good:
        assert accepts(ToolRules((MOVE, WAIT), **rules), text), text
    for text in bad:
        assert not accepts(ToolRules((MOVE, WAIT), **rules), text), text


def test_calls_begin_with_the_token_that_the_rules_name() -> None:
    rules = ToolRules((MOVE,), begin="[CALL]", begin_token=77, several=False)
    out = written(state(Grammar("tools", msgspec.json.encode(rules).decode())))
    assert out[0].token == 77
    assert json.loads(TOKENIZER.decode(ids(out[1:])))["name"] == "move"


def test_a_name_cannot_write_grammar() -> None:
    raw = b'{"tools":[{"name":"f\\" | /.*/ \\""}]}'
    with pytest.raises(InvalidRequest, match="tools"):
        BYTES.matcher(Grammar("tools", raw.decode()), PATIENCE_S)
    rules = ToolRules((WAIT,), begin='" | "x', end="\\\n#", several=False)
    assert accepts(rules, b'" | "x{"name": "wait", "arguments": 1}\\\n#')
    assert not accepts(rules, b"x")
