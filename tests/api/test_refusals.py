"""What is refused, with which status and words. Plain HTTP, as any client may send it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from shoal.api import ApiConfig
from shoal.errors import NoCapacity, Refused

from .stub import StubBackend

pytestmark = pytest.mark.anyio

CHAT = {"model": "shoal-tiny", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "shoal-tiny", "prompt": "hi"}

TOOL = {"type": "function", "function": {"name": "f"}}
BAD_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "strin"}}}


def format_of(schema: dict[str, Any]) -> dict[str, Any]:
    return {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    }


def error_in(response: httpx.Response) -> dict[str, Any]:
    error = response.json()["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    assert response.headers["x-request-id"]
    return error


@pytest.mark.parametrize("raw", [b"", b"{", b"[1, 2", b"\xff\xfe", b'"text"', b"nul", b"[" * 5000])
async def test_what_is_no_json_object_is_refused(http: httpx.AsyncClient, raw: bytes) -> None:
    response = await http.post(
        "/v1/chat/completions", content=raw, headers={"content-type": "application/json"}
    )
    assert response.status_code == 400
    assert error_in(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "pope", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"model": 5}, "model"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"n": 17}, "n"),
        ({"n": 0}, "n"),
        ({"stop": 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": "much"}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"logprobs": True, "top_logprobs": 21}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "perhaps"}, "tool_choice"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [TOOL]},
            "tool_choice",
        ),
        ({"tools": [{}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [TOOL] * 129}, "tools"),
        ({"tools": [TOOL], "response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [BAD_TOOL], "tool_choice": "required"}, "tools"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        (format_of({"type": "strin"}), "response_format"),
        (format_of({"type": "string", "description": "x" * 41_000}), "response_format"),
        (format_of({"type": "integer", "multipleOf": 10**9}), "response_format"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0]"),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}],
                    }
                ]
            },
            "messages[0].tool_calls[0]",
        ),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "alloy"}}, "audio"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"guided_json": {"type": "object"}}, "guided_json"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content",
        ),
    ],
)
async def test_a_bad_parameter_of_a_chat_is_named(
    http: httpx.AsyncClient, backend: StubBackend, change: dict[str, Any], param: str
) -> None:
    response = await http.post("/v1/chat/completions", json=CHAT | change)
    assert response.status_code == 400
    assert error_in(response)["param"] == param
    assert backend.requests == []


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": {"text": "x"}}, "prompt"),
        ({"prompt": [1, "x"]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [257]}, "prompt"),
        ({"prompt": ["x"] * 129}, "prompt"),
        ({"prompt": ["x"] * 65, "n": 2}, "prompt"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
async def test_a_bad_parameter_of_a_completion_is_named(
    http: httpx.AsyncClient, backend: StubBackend, change: dict[str, Any], param: str
) -> None:
    response = await http.post("/v1/completions", json=TEXT | change)
    assert response.status_code == 400
    assert error_in(response)["param"] == param
    assert backend.requests == []


async def test_what_changes_nothing_is_accepted(http: httpx.AsyncClient) -> None:
    harmless = {
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "audio": None,
        "functions": [],
        "user": "me",
        "metadata": {"a": "b"},
        "n": None,
        "stop": None,
        "temperature": None,
        "top_k": -1,
    }
    assert (await http.post("/v1/chat/completions", json=CHAT | harmless)).status_code == 200
    assert (await http.post("/v1/completions", json=TEXT | {"best_of": 1})).status_code == 200


async def test_half_a_surrogate_pair_is_refused(http: httpx.AsyncClient) -> None:
    raw = json.dumps(TEXT | {"prompt": "a\ud800"}).encode()
    response = await http.post(
        "/v1/completions", content=raw, headers={"content-type": "application/json"}
    )
    assert response.status_code == 400


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", None])
async def test_only_json_is_read(http: httpx.AsyncClient, kind: str | None) -> None:
    headers = {"content-type": kind} if kind else {}
    response = await http.post("/v1/completions", content=json.dumps(TEXT), headers=headers)
    assert response.status_code == 415
    assert "application/json" in error_in(response)["message"]


async def test_json_with_a_charset_is_json(http: httpx.AsyncClient) -> None:
    kind = {"content-type": "Application/JSON; charset=utf-8"}
    response = await http.post("/v1/completions", content=json.dumps(TEXT), headers=kind)
    assert response.status_code == 200


async def test_a_large_body_is_refused_however_it_is_sent(wire: httpx.AsyncClient) -> None:
    large = b" " * ((4 << 20) + 1)

    async def in_chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(large), 1 << 16):
            yield large[start : start + (1 << 16)]

    for content in (large, in_chunks()):
        response = await wire.post(
            "/v1/completions", content=content, headers={"content-type": "application/json"}
        )
        assert response.status_code == 413
        assert error_in(response)["code"] == "body_too_large"


async def test_a_million_wrong_items_cost_one_error(http: httpx.AsyncClient) -> None:
    raw = b'{"model":"shoal-tiny","prompt":[' + b"{}," * 1_000_000 + b"1]}"
    response = await http.post(
        "/v1/completions", content=raw, headers={"content-type": "application/json"}, timeout=4
    )
    assert response.status_code == 400
    assert len(response.content) < 1000


async def test_paths_and_methods_that_do_not_exist_are_refused_in_our_form(
    http: httpx.AsyncClient,
) -> None:
    missing = await http.get("/v1/nothing")
    assert (missing.status_code, error_in(missing)["type"]) == (404, "not_found_error")
    wrong = await http.get("/v1/completions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert "GET /v1/completions" in error_in(wrong)["message"]


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (NoCapacity("no room", hint="free some"), 503, "unavailable_error"),
        (Refused("not for you"), 403, "permission_error"),
    ],
)
async def test_errors_of_the_mesh_keep_their_status(
    http: httpx.AsyncClient, backend: StubBackend, error: Exception, status: int, kind: str
) -> None:
    backend.refusal = error
    response = await http.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == status
    assert error_in(response)["type"] == kind
    assert ("retry-after" in response.headers) == (status == 503)


async def test_a_bug_is_a_500_that_tells_nothing(
    wire: httpx.AsyncClient, backend: StubBackend, caplog: pytest.LogCaptureFixture
) -> None:
    backend.refusal = KeyError("a secret")
    response = await wire.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 500
    assert "secret" not in response.text
    assert error_in(response)["type"] == "api_error"
    assert "KeyError" in caplog.text


async def test_a_bug_in_mid_stream_is_an_error_event(
    wire: httpx.AsyncClient, backend: StubBackend, caplog: pytest.LogCaptureFixture
) -> None:
    backend.failure, backend.fails_at = KeyError("a secret"), 3
    response = await wire.post("/v1/chat/completions", json=CHAT | {"stream": True})
    assert response.status_code == 200
    last = response.text.strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "internal error"
    assert "secret" not in response.text
    assert "KeyError" in caplog.text


class TestWithAKey:
    @pytest.fixture
    def config(self) -> ApiConfig:
        return ApiConfig(api_key="sesame-ö")

    @pytest.mark.parametrize(
        "authorization", [None, "Bearer", "Bearer wrong", "Basic sesame-ö", "sesame-ö"]
    )
    async def test_without_the_key_nothing_is_answered(
        self, http: httpx.AsyncClient, authorization: str | None
    ) -> None:
        headers = {"authorization": authorization.encode()} if authorization else {}
        for path in ("/v1/models", "/metrics", "/v1/node", "/v1/nothing"):
            response = await http.get(path, headers=headers)
            assert response.status_code == 401
            assert error_in(response)["type"] == "authentication_error"
            assert response.headers["www-authenticate"] == "Bearer"

    async def test_with_the_key_everything_is(self, http: httpx.AsyncClient) -> None:
        headers = {"authorization": "Bearer sesame-ö".encode()}
        assert (await http.get("/v1/models", headers=headers)).status_code == 200
        response = await http.post("/v1/chat/completions", json=CHAT, headers=headers)
        assert response.status_code == 200

    async def test_health_needs_no_key(self, http: httpx.AsyncClient) -> None:
        assert (await http.get("/health")).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7470", "127.0.0.1.evil.example", ""]
)
async def test_a_foreign_host_name_is_refused(http: httpx.AsyncClient, host: str) -> None:
    response = await http.get("/v1/models", headers={"host": host})
    assert response.status_code == 403
    assert error_in(response)["code"] == "refused_by_policy"


@pytest.mark.parametrize("host", ["localhost", "LocalHost:1", "127.0.0.1:7470", "[::1]:7470"])
async def test_the_names_of_loopback_are_served(http: httpx.AsyncClient, host: str) -> None:
    assert (await http.get("/v1/models", headers={"host": host})).status_code == 200
