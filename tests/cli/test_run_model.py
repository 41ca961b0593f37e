from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from shoal.cli import run_model
from shoal.cli.client import NodeClient

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


def test_a_conversation_remembers_and_ends_with_bye(
    fake_node: FakeNode, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["hello", "", "and then?", "/bye", "never read"])
    monkeypatch.setattr("builtins.input", lambda mark: next(lines))
    talk = run_model.Conversation(NodeClient(fake_node.url), "shoal-tiny", {}, raw=False)
    run_model.converse(talk)
    assert capsys.readouterr().out == 2 * "    if n < 2: return n\n"
    roles = [[message["role"] for message in body["messages"]] for _, body in fake_node.asked]
    assert roles == [["user"], ["user", "assistant", "user"]]


def test_ctrl_c_stops_an_answer_but_not_the_conversation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupted:
        def ask(self, prompt: str, show: object) -> None:
            raise KeyboardInterrupt

    lines = iter(["first", "second"])
    monkeypatch.setattr("builtins.input", lambda mark: read(lines))
    run_model.converse(Interrupted())  # type: ignore[arg-type]
    assert capsys.readouterr().err.count("(stopped)") == 2


def read(lines: Iterator[str]) -> str:
    for line in lines:
        return line
    raise EOFError


def test_the_embedded_node_is_asked_when_none_runs(
    shoal: Shoal, fake_node: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own name of the model is used: a folder's name means nothing to the API."""
    monkeypatch.setattr(run_model, "is_running", lambda client: False)
    monkeypatch.setattr(
        run_model, "embedded", lambda model, flags: nullcontext(NodeClient(fake_node.url))
    )
    result = shoal("run", "./a/folder", "hello", asks=False)
    assert result.exit_code == 0
    assert "starting one for ./a/folder" in result.stderr
    assert fake_node.asked[0][1]["model"] == "shoal-tiny"
