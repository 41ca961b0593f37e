"""Answers of a given form, from a model whose layers are in two processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import BadRequestError, OpenAI

from .live import LiveNode, live_mesh

pytestmark = pytest.mark.e2e

POINT = {
    "type": "object",
    "properties": {
        "x": {"type": "integer", "minimum": 0, "maximum": 99},
        "name": {"type": "string", "maxLength": 12},
    },
    "required": ["x", "name"],
    "additionalProperties": False,
}
CHAT: dict[str, Any] = {
    "model": "shoal-tiny",
    "messages": [{"role": "user", "content": "Where is the reef?"}],
    "max_tokens": 300,
}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[LiveNode]]:
    """Two stages, and a gateway without layers."""
    folder: Path = tmp_path_factory.mktemp("structured")
    with live_mesh(folder, ["0:4", "4:8", ""]) as live:
        yield live


def client_of(node: LiveNode) -> OpenAI:
    return OpenAI(base_url=f"{node.api}/v1", api_key="none", max_retries=0, timeout=60)


def check_point(text: str) -> None:
    point = json.loads(text)
    assert sorted(point) == ["name", "x"]
    assert 0 <= point["x"] <= 99
    assert len(point["name"]) <= 12


def test_every_gateway_gives_the_same_json_of_the_schema(nodes: list[LiveNode]) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "point", "schema": POINT}}
    texts = set()
    for node in nodes:
        answer = client_of(node).chat.completions.create(
            **CHAT, response_format=wanted, temperature=0
        )
        assert answer.choices[0].finish_reason == "stop"
        texts.add(answer.choices[0].message.content)
    (text,) = texts
    check_point(text)


def test_a_forced_call_comes_as_a_call_beside_free_text(nodes: list[LiveNode]) -> None:
    tools = [{"type": "function", "function": {"name": "find", "parameters": POINT}}]
    with client_of(nodes[2]) as client:
        stream = client.chat.completions.create(
            **CHAT, tools=tools, tool_choice="required", parallel_tool_calls=False, stream=True
        )
        free = client.chat.completions.create(**CHAT | {"max_tokens": 8})
        chunks = [chunk.choices[0] for chunk in stream]
    (call,) = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    assert call.function.name == "find"
    check_point(call.function.arguments)
    assert chunks[-1].finish_reason == "tool_calls"
    assert free.choices[0].message.content


def test_a_schema_that_cannot_be_used_is_a_400_and_ends_nothing_else(nodes: list[LiveNode]) -> None:
    wrong = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strin"}}}
    with pytest.raises(BadRequestError, match="strin"):
        client_of(nodes[2]).chat.completions.create(**CHAT, response_format=wrong)
    assert httpx.get(f"{nodes[0].api}/health").status_code == 200
