"""Streams, clients that leave, and the end of a server."""

from __future__ import annotations

import asyncio
import json
import signal
import socket

import anyio
import httpx
import pytest

from shoal.api import ApiConfig, ApiServer, config_for_bind, create_app
from shoal.errors import BadConfig

from .stub import StubBackend

pytestmark = pytest.mark.anyio

CHAT = {"model": "shoal-tiny", "messages": [{"role": "user", "content": "hi"}]}


async def test_health_follows_the_node(wire: httpx.AsyncClient, backend: StubBackend) -> None:
    response = await wire.get("/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})
    backend.loading = True
    response = await wire.get("/health")
    assert (response.status_code, response.json()) == (503, {"status": "loading"})


async def test_the_node_shows_itself(wire: httpx.AsyncClient) -> None:
    assert (await wire.get("/v1/node")).json() == {"name": "amber-fox"}
    assert (await wire.get("/v1/mesh")).json() == {"nodes": []}
    assert "/v1" in (await wire.get("/")).text
    metrics = await wire.get("/metrics")
    assert metrics.text == "shoal_nodes 3.0\n"
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")


async def test_a_stream_is_framed_as_events(wire: httpx.AsyncClient) -> None:
    response = await wire.post("/v1/chat/completions", json=CHAT | {"stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-store"
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    for event in events[:-2]:
        assert json.loads(event.removeprefix("data: "))["choices"]


async def test_a_silent_stream_is_kept_alive_by_comments(
    wire: httpx.AsyncClient, backend: StubBackend
) -> None:
    backend.waits_at = 1
    async with wire.stream(
        "POST", "/v1/chat/completions", json=CHAT | {"stream": True}
    ) as response:
        lines = response.aiter_lines()
        assert [await anext(lines) for _ in range(4)] == [": still working", ""] * 2
        backend.go.set()
        assert [line async for line in lines if line][-1] == "data: [DONE]"


async def test_tokens_arrive_when_they_are_made(
    wire: httpx.AsyncClient, backend: StubBackend
) -> None:
    backend.waits_at = 4
    async with wire.stream(
        "POST", "/v1/chat/completions", json=CHAT | {"stream": True}
    ) as response:
        heard = ""
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                heard += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
            if heard == "Hel":  # and no more will come before the model is let go on
                backend.go.set()
        assert heard == "Hello, world"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_leaves_cancels_its_generations(
    server: ApiServer, backend: StubBackend, stream: bool, n: int
) -> None:
    backend.waits_at = 3
    body = json.dumps(CHAT | {"stream": stream, "n": n}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(head.encode() + body)
    with anyio.fail_after(5):
        await backend.waiting.wait()
        assert not any(generation.closed.is_set() for generation in backend.generations)
        writer.close()
        for generation in backend.generations:
            await generation.closed.wait()
    assert len(backend.generations) == n


async def test_a_slow_body_is_given_up() -> None:
    app = create_app(StubBackend(), ApiConfig(body_timeout_s=0.05), bytes)
    async with ApiServer(app, port=0) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        writer.write(head + b"Content-Type: application/json\r\nContent-Length: 9\r\n\r\n{")
        with anyio.fail_after(5):
            assert (await reader.readline()).startswith(b"HTTP/1.1 408")
        writer.close()


async def test_the_end_of_the_server_ends_each_stream_with_an_error() -> None:
    backend = StubBackend()
    backend.waits_at = 3
    heard = anyio.Event()
    lines: list[str] = []

    async def listen(url: str) -> None:
        async with (
            httpx.AsyncClient() as client,
            client.stream("POST", url, json=CHAT | {"stream": True}) as response,
        ):
            async for line in response.aiter_lines():
                lines.append(line)
                heard.set()

    with anyio.fail_after(5):
        async with (
            anyio.create_task_group() as tasks,
            ApiServer(create_app(backend, ApiConfig(), bytes), port=0, grace_s=60) as server,
        ):
            tasks.start_soon(listen, f"{server.url}/v1/chat/completions")
            await heard.wait()
    last = [line for line in lines if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
    assert backend.generations[0].closed.is_set()


async def test_the_end_of_the_server_answers_those_who_wait() -> None:
    backend = StubBackend()
    backend.waits_at = 3
    answers: list[httpx.Response] = []

    async def ask(url: str) -> None:
        async with httpx.AsyncClient() as client:
            answers.append(await client.post(url, json=CHAT))

    with anyio.fail_after(5):
        async with (
            anyio.create_task_group() as tasks,
            ApiServer(create_app(backend, ApiConfig(), bytes), port=0, grace_s=60) as server,
        ):
            tasks.start_soon(ask, f"{server.url}/v1/chat/completions")
            await backend.waiting.wait()
    assert answers[0].status_code == 503
    assert answers[0].json()["error"]["code"] == "shutting_down"


async def test_a_cancelled_node_still_ends_its_server_in_order() -> None:
    backend = StubBackend()
    with anyio.fail_after(5), anyio.CancelScope() as scope:
        async with ApiServer(create_app(backend, ApiConfig(), bytes), port=0) as server:
            port = server.port
            scope.cancel()
            await anyio.sleep_forever()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)


async def test_signals_stay_the_callers() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    async with ApiServer(create_app(StubBackend(), ApiConfig(), bytes), port=0) as server:
        async with httpx.AsyncClient() as client:
            await client.get(f"{server.url}/health")
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


async def test_a_port_in_use_is_a_clear_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = ApiServer(create_app(StubBackend(), ApiConfig(), bytes), port=port)
        with pytest.raises(BadConfig, match=f"port {port}") as caught:
            await server.__aenter__()
    assert "--port" in caught.value.hint


async def test_ipv6_is_served() -> None:
    app = create_app(StubBackend(), ApiConfig(), bytes)
    async with ApiServer(app, host="::1", port=0) as server, httpx.AsyncClient() as client:
        assert server.url.startswith("http://[::1]:")
        assert (await client.get(f"{server.url}/v1/models")).status_code == 200


def test_listening_beyond_loopback_needs_a_key() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "myhost"):  # noqa: S104
        with pytest.raises(BadConfig, match="without a key"):
            config_for_bind(host)
        config = config_for_bind(host, "sesame")
        assert (config.api_key, config.allowed_hosts) == ("sesame", ())
    for host in ("127.0.0.1", "::1", "localhost", "127.9.9.9"):
        config = config_for_bind(host)
        assert config.api_key is None
        assert "localhost" in config.allowed_hosts


async def test_a_choice_cut_by_a_stop_string_frees_its_pages_while_others_go_on(
    wire: httpx.AsyncClient, backend: StubBackend
) -> None:
    backend.text_for = lambda request: "ab" if request.sampling.seed == 1 else "xyz"
    backend.waits_at = 3
    body = CHAT | {"stream": True, "n": 2, "seed": 1, "stop": "b"}
    with anyio.fail_after(5):
        async with wire.stream("POST", "/v1/chat/completions", json=body) as response:
            await backend.waiting.wait()
            await backend.generations[0].closed.wait()
            assert not backend.generations[1].closed.is_set()
            backend.go.set()
            assert [line async for line in response.aiter_lines() if line][-1] == "data: [DONE]"
