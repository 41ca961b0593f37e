from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import count, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.api.calls import Call, CallReader
from shoal.api.dialect import HERMES, LLAMA, MISTRAL, Dialect

NAMES = ("look", "wait")
LOOK = '{"name": "look", "arguments": {"at": "a < b"}}'
WAIT = '{"name": "wait", "parameters": {}}'


def read(dialect: Dialect, pieces: Sequence[str]) -> tuple[str, list[Call]]:
    ids = count()
    reader = CallReader(dialect, NAMES, lambda: f"id{next(ids)}")
    shown, calls = "", []
    for at, piece in enumerate(pieces):
        text, found = reader.read(piece, last=at == len(pieces) - 1)
        shown += text
        calls += found
    assert reader.found == len(calls)
    return shown, calls


CASES = [
    (HERMES, "no call", "no call", []),
    (HERMES, "a <tool b <tool_call", "a <tool b <tool_call", []),
    (HERMES, f"<tool_call>\n{LOOK}\n</tool_call>", "", ["look"]),
    (HERMES, f"Well: <tool_call>{LOOK}</tool_call>\n", "Well: ", ["look"]),
    (HERMES, f"<tool_call>{LOOK}</tool_call>\n<tool_call>{WAIT}</tool_call>", "", NAMES),
    (HERMES, f"<tool_call>{LOOK}</tool_call> so", "so", ["look"]),
    (HERMES, f"<tool_call>\n{LOOK}", "", ["look"]),
    (HERMES, f"<tool_call>{LOOK[:-1]}", f"<tool_call>{LOOK[:-1]}", []),
    (HERMES, "<tool_call>{}</tool_call>", "<tool_call>{}</tool_call>", []),
    (HERMES, '<tool_call>{"name": "rm"}</tool_call>', '<tool_call>{"name": "rm"}</tool_call>', []),
    (LLAMA, " " + WAIT, "", ["wait"]),
    (LLAMA, f"{LOOK}; {WAIT}", "", NAMES),
    (LLAMA, f"<|python_tag|>{WAIT}", "", ["wait"]),
    (LLAMA, '{"answer": 5}', '{"answer": 5}', []),
    (LLAMA, f"I say {WAIT}", f"I say {WAIT}", []),
    (LLAMA, "<|python", "<|python", []),
    (LLAMA, "  ", "  ", []),
    (MISTRAL, f"[TOOL_CALLS] [{LOOK}, {WAIT}]", "", NAMES),
    (MISTRAL, f"[TOOL_CALLS]{LOOK}", "", ["look"]),
    (MISTRAL, "[TOOL_CALLS] [" + "[" * 5000, "[TOOL_CALLS] [" + "[" * 5000, []),
    (MISTRAL, "[1, 2]", "[1, 2]", []),
]


@pytest.mark.parametrize(("dialect", "text", "shown", "names"), CASES)
def test_calls_are_told_from_text(
    dialect: Dialect, text: str, shown: str, names: Sequence[str]
) -> None:
    said, calls = read(dialect, [text])
    assert (said, [call.name for call in calls]) == (shown, list(names))
    assert all(isinstance(json.loads(call.arguments), dict) for call in calls)
    assert [call.id for call in calls] == [f"id{at}" for at in range(len(calls))]


@given(st.sampled_from(CASES), st.lists(st.integers(0, 120), max_size=12))
def test_how_a_text_is_cut_changes_nothing(case: tuple, cuts: list[int]) -> None:
    dialect, text, shown, names = case
    edges = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    pieces = [text[a:b] for a, b in pairwise(edges)]
    said, calls = read(dialect, pieces)
    assert (said, [call.name for call in calls]) == (shown, list(names))
