from __future__ import annotations

import json
import socket

from .conftest import Shoal
from .fake_node import FakeNode, problem

NO_TEMPLATE = problem("shoal-tiny has no chat template", "invalid_request_error", "invalid_value")


def test_a_prompt_is_answered_as_chat(shoal: Shoal, fake_node: FakeNode) -> None:
    result = shoal("run", "shoal-tiny", "hello", "--system", "be brief", "--max-tokens", "5")
    assert result.stdout == "    if n < 2: return n\n"
    path, body = fake_node.asked[0]
    assert path == "/v1/chat/completions"
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert body["max_tokens"] == 5
    assert "temperature" not in body


def test_a_model_without_chat_template_continues_the_text(
    shoal: Shoal, fake_node: FakeNode
) -> None:
    fake_node.chat_error = NO_TEMPLATE
    result = shoal("run", "shoal-tiny", "def f(n):")
    assert result.stdout == "    if n < 2: return n\n"
    assert "no chat template" in result.stderr
    path, body = fake_node.asked[-1]
    assert (path, body["prompt"]) == ("/v1/completions", "def f(n):")


def test_raw_never_asks_for_chat(shoal: Shoal, fake_node: FakeNode) -> None:
    shoal("run", "shoal-tiny", "def f(n):", "--raw")
    assert [path for path, _ in fake_node.asked] == ["/v1/completions"]


def test_piped_text_is_the_prompt(shoal: Shoal, fake_node: FakeNode) -> None:
    shoal("run", "shoal-tiny", "--raw", stdin="import os\n")
    assert fake_node.asked[0][1]["prompt"] == "import os\n"


def test_json_carries_text_and_figures(shoal: Shoal) -> None:
    told = json.loads(shoal("run", "shoal-tiny", "hello", "--json").stdout)
    assert told["text"] == "    if n < 2: return n"
    assert told["tokens"] == 3
    assert told["finish_reason"] == "length"


def test_a_refusal_keeps_the_nodes_words_and_exit_code(shoal: Shoal, fake_node: FakeNode) -> None:
    fake_node.chat_error = problem(
        "nobody holds layers 3:5; try: shoal up --model shoal-tiny", "unavailable_error", "no_route"
    )
    result = shoal("run", "shoal-tiny", "hello")
    assert result.exit_code == 4
    assert result.stderr == ("error: nobody holds layers 3:5\n  try: shoal up --model shoal-tiny\n")


def test_a_stream_that_breaks_off_is_an_error(shoal: Shoal, fake_node: FakeNode) -> None:
    fake_node.cut_after = 1
    result = shoal("run", "shoal-tiny", "hello")
    assert result.exit_code == 1
    assert "broke off" in result.stderr


def test_a_named_api_that_does_not_answer_starts_no_node(shoal: Shoal) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{unused.getsockname()[1]}"
        result = shoal("run", "shoal-tiny", "hello", "--api", nowhere, asks=False)
    assert result.exit_code == 3
