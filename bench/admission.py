"""Requests a second at the gateway with a free engine, and how a running stream fares beside them.

Server, load and listener are processes of their own on loopback. The peer is a bare Starlette route
that parses the same body under the same uvicorn. The listener reads a stream with a token every
5 ms and notes how long it waits for each. `cpu_us` is the server's time, user and system, for one
request: the aim rests on it, since other programs on the machine disturb it least.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import psutil
import tokenizers
from contract import Bench, percentile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from tokenizers import decoders, models, pre_tokenizers

from shoal.api import ApiConfig, ApiServer, GenerationRequest, ServedModel, create_app
from shoal.engine.request import Sampled
from shoal.errors import ModelNotFound
from shoal.models.chat_template import ChatTemplate
from shoal.models.text import Tokenizer
from shoal.units import SessionId

BEAT_S = 0.005
BEATING = 1 << 20  # max_tokens of the stream that beats; all others are as fast as can be
STALL_S = 0.05
CHAT = {
    "model": "stub",
    "messages": [{"role": "user", "content": "Write a haiku about many small fishes."}],
    "max_tokens": 1,
}
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
PEER = "bare Starlette route"
LOADS: dict[str, tuple[str, dict[str, Any]]] = {
    PEER: ("/bare", CHAT),
    "chat": ("/v1/chat/completions", CHAT),
    "chat, streamed": ("/v1/chat/completions", CHAT | {"stream": True}),
    "chat, 32 tokens streamed": ("/v1/chat/completions", CHAT | {"stream": True, "max_tokens": 32}),
}


# ---- the server


def byte_tokenizer() -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(models.BPE({x: i for i, x in enumerate(letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return Tokenizer(inner, templates={"default": ChatTemplate(TEMPLATE, {})})


class StubGeneration:
    session, route = SessionId("0" * 16), ()

    def __init__(self, request: GenerationRequest) -> None:
        self._token, self._count = request.prompt_ids[0], request.sampling.max_tokens

    async def __aiter__(self) -> AsyncIterator[Sampled]:
        for left in reversed(range(self._count)):
            if self._count == BEATING:
                await asyncio.sleep(BEAT_S)
            yield Sampled(self._token, "" if left else "length")

    async def aclose(self) -> None: ...


class StubBackend:
    loading = False

    def __init__(self) -> None:
        self._model = ServedModel("stub", 0, 2 * BEATING, True, byte_tokenizer(), "fp")

    def models(self) -> list[ServedModel]:
        return [self._model]

    def find(self, name: str) -> ServedModel:
        if name != "stub":
            raise ModelNotFound(name)
        return self._model

    async def generate(self, request: GenerationRequest) -> StubGeneration:
        return StubGeneration(request)

    def status(self) -> dict[str, Any]:
        return {}

    mesh = status


async def bare(request: Request) -> Response:
    return JSONResponse({"model": (await request.json())["model"]})


async def serve() -> None:
    app = create_app(StubBackend(), ApiConfig(), bytes)
    app.router.routes.insert(0, Route("/bare", bare, methods=["POST"]))
    async with ApiServer(app, port=0) as server:
        print(server.port, flush=True)
        await asyncio.to_thread(sys.stdin.read)  # until the parent closes it


# ---- the load


def http_request(path: str, body: dict[str, Any]) -> bytes:
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw


class Caller(asyncio.Protocol):
    """One kept-alive connection that asks again as soon as it is answered."""

    def __init__(self, request: bytes, stop: float) -> None:
        self._request, self._stop, self._heard = request, stop, b""
        self.answers = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._heard += data
        if not whole(self._heard):
            return
        assert self._heard.startswith(b"HTTP/1.1 200"), self._heard
        self._heard = b""
        self.answers += 1
        if time.perf_counter() < self._stop:
            self._transport.write(self._request)
        else:
            self._transport.close()
            self.done.set_result(None)


def whole(heard: bytes) -> bool:
    head, gap, body = heard.partition(b"\r\n\r\n")
    if not gap:
        return False
    _, named, length = head.lower().partition(b"content-length: ")
    if named:
        return len(body) >= int(length.partition(b"\r\n")[0])
    return body.endswith(b"0\r\n\r\n")


async def load(port: int, request: bytes, connections: int, seconds: float) -> float:
    """Requests a second over that many connections."""
    began = time.perf_counter()
    callers = [Caller(request, began + seconds) for _ in range(connections)]
    loop = asyncio.get_running_loop()
    for caller in callers:
        await loop.create_connection(lambda caller=caller: caller, "127.0.0.1", port)
    await asyncio.gather(*(caller.done for caller in callers))
    return sum(caller.answers for caller in callers) / (time.perf_counter() - began)


# ---- the listener


async def listen(port: int) -> None:
    """For each line on stdin print the waits between tokens since the last one, in seconds."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = CHAT | {"stream": True, "max_tokens": BEATING}
    writer.write(http_request("/v1/chat/completions", body))
    waits: list[float] = []

    async def count() -> None:
        last = time.perf_counter()
        while True:
            await reader.readuntil(b"\n\n")
            now = time.perf_counter()
            waits.append(now - last)
            last = now

    counting = asyncio.create_task(count())
    while await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(waits), flush=True)
        waits.clear()
    counting.cancel()
    writer.close()


# ---- the measurement


class Child:
    """This script in another process; a line to it is answered by a line."""

    def __init__(self, *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def hear(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def ask(self) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.hear()

    def end(self) -> None:
        self.process.communicate()


class Scene:
    """A server, and a stream that runs beside whatever load."""

    def __init__(self) -> None:
        self._server = Child("--serve")
        self._port = int(self._server.hear())
        self._cost = psutil.Process(self._server.process.pid)
        self._listener = Child("--listen", str(self._port))
        self._listener.ask()
        time.sleep(0.5)  # the stream has begun

    def end(self) -> None:
        self._listener.end()
        self._server.end()

    def quiet(self, seconds: float) -> list[float]:
        self._listener.ask()
        time.sleep(seconds)
        waits: list[float] = self._listener.ask()
        return waits

    def loaded(self, name: str, connections: int, seconds: float) -> dict[str, Any]:
        self._listener.ask()
        before = sum(self._cost.cpu_times()[:2])
        path, body = LOADS[name]
        rate = asyncio.run(load(self._port, http_request(path, body), connections, seconds))
        cpu_s = sum(self._cost.cpu_times()[:2]) - before
        return {
            "rate": rate,
            "cpu_us": cpu_s / (rate * seconds) * 1e6,
            "waits": self._listener.ask(),
        }


def stalls(waits: list[float]) -> dict[str, Any]:
    return {
        "wait_p50_ms": percentile(waits, 50) * 1e3,
        "wait_p99_ms": percentile(waits, 99) * 1e3,
        "wait_max_ms": max(waits) * 1e3,
        "over_50_ms": sum(wait > STALL_S for wait in waits),
    }


def measure(bench: Bench, scene: Scene) -> None:
    repeats, seconds = (3, 0.8) if bench.quick else (7, 3.0)
    bench.row(what="stream, no load", **stalls(scene.quiet(seconds * repeats)))
    for connections in (1, 32):
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in LOADS}
        for _ in range(repeats):  # interleaved: a busy moment of the machine hits all alike
            for name, results in rounds.items():
                results.append(scene.loaded(name, connections, seconds))
        report(bench, connections, rounds)


def report(bench: Bench, connections: int, rounds: dict[str, list[dict[str, Any]]]) -> None:
    cpu_us, late_s = {}, {}
    for name, results in rounds.items():
        rates = [result["rate"] for result in results]
        waits = [wait for result in results for wait in result["waits"]]
        cpu_us[name] = statistics.median(result["cpu_us"] for result in results)
        late_s[name] = percentile(waits, 99)
        bench.row(
            what=f"{name}, {connections} conn.",
            requests_per_s=statistics.median(rates),
            least=min(rates),
            most=max(rates),
            cpu_us=cpu_us[name],
            **stalls(waits),
        )
    if connections > 1:
        dearer = cpu_us["chat"] / cpu_us[PEER]
        bench.aim("server CPU a request, chat / bare", "<= 3", got=dearer, holds=dearer <= 3)
        later = late_s["chat"] / late_s[PEER]
        bench.aim("p99 wait of a stream, chat / bare", "<= 1.5", got=later, holds=later <= 1.5)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--listen", type=int, metavar="PORT", help=argparse.SUPPRESS)
    own, _ = parser.parse_known_args()
    if own.serve:
        asyncio.run(serve())
    elif own.listen:
        asyncio.run(listen(own.listen))
    else:
        bench = Bench("admission", __doc__, parser=parser)
        scene = Scene()
        try:
            measure(bench, scene)
        finally:
            scene.end()
        bench.finish()


if __name__ == "__main__":
    main()
