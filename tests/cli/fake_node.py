"""An HTTP server that answers as a node would: /v1/node, /v1/mesh and streamed completions."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

AMBER = "npub1amber" + "q" * 53
LAKE = "npub1lake" + "q" * 54
TICKET = "SHOAL1ABCDEFG"
MODEL_ID = "0123456789abcdef"

NODE: dict[str, Any] = {
    "node": AMBER,
    "name": "amber-fox",
    "version": "0.1.0",
    "uptime_s": 75.0,
    "mesh": {"label": "shoal", "private": False},
    "relays": [
        {"url": "ws://127.0.0.1:7447", "connected": True, "attempts": 1, "error": None},
        {"url": "wss://gone.example", "connected": False, "attempts": 4, "error": "refused"},
    ],
    "addresses": ["127.0.0.1:7471"],
    "capability": {
        "cpu": "AMD EPYC",
        "cores": 2,
        "memory_bytes": 8_000_000_000,
        "free_memory_bytes": 4_000_000_000,
        "devices": [],
        "memory_bytes_per_s": 21e9,
        "bf16_flops": 1e11,
    },
    "stages": [
        {
            "model": MODEL_ID,
            "model_name": "shoal-tiny",
            "layers": "0:3",
            "state": "serving",
            "compute": "bf16",
            "pages_used": 0.25,
            "free_tokens": 6144,
            "total_tokens": 8192,
            "sessions": 2,
        }
    ],
    "links": [{"node": LAKE, "name": "still-lake"}],
    "faults": {},
    "ticket": None,
    "from_a_later_version": {"is": "ignored"},
}


def stage(layers: str, state: str = "serving") -> dict[str, Any]:
    return {
        "model": MODEL_ID,
        "model_name": "shoal-tiny",
        "layers": layers,
        "total_layers": 8,
        "state": state,
        "compute": "bf16",
        "free_tokens": 6144,
        "layer_seconds": 0.001,
    }


def member(node: str, name: str, layers: str, *, is_self: bool = False) -> dict[str, Any]:
    return {
        "node": node,
        "name": name,
        "self": is_self,
        "age_s": 0.0 if is_self else 75.0,
        "software": "shoal/0.1.0",
        "addresses": 1,
        "memory_bytes": 8_000_000_000,
        "memory_bytes_per_s": 21e9,
        "gateway": is_self,
        "stages": [stage(layers)],
    }


MESH: dict[str, Any] = {
    "nodes": [member(LAKE, "still-lake", "3:8"), member(AMBER, "amber-fox", "0:3", is_self=True)],
    "models": [
        {
            "model": MODEL_ID,
            "name": "shoal-tiny",
            "total_layers": 8,
            "ready": True,
            "weakest": 1,
            "missing": [],
            "context_length": 2048,
        }
    ],
}


class FakeNode:
    """What it answers may be changed by the test; `asked` keeps the POSTs: path and body."""

    def __init__(self) -> None:
        self.node = dict(NODE)
        self.mesh = dict(MESH)
        self.ticket: str | None = TICKET
        self.api_key = ""
        self.chat_error: dict[str, Any] | None = None
        self.words = ["    if n", " < 2:", " return n"]
        self.cut_after: int | None = None  # events, then the stream ends without [DONE]
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.url = ""

    def got(self, path: str) -> tuple[int, dict[str, Any]]:
        """Status and body of a GET."""
        match path:
            case "/v1/node":
                return 200, self.node
            case "/v1/node?ticket=1":
                return 200, {**self.node, "ticket": self.ticket}
            case "/v1/mesh":
                return 200, self.mesh
        return 404, problem("no such path", "not_found_error", None)

    def events(self, chat: bool) -> Iterator[str]:
        for word in self.words:
            choice = {"delta": {"content": word}} if chat else {"text": word}
            yield json.dumps({"choices": [{"index": 0, "finish_reason": None, **choice}]})
        last = {"delta": {}} if chat else {"text": ""}
        yield json.dumps({"choices": [{"index": 0, "finish_reason": "length", **last}]})
        yield json.dumps({"choices": [], "usage": {"completion_tokens": len(self.words)}})
        yield "[DONE]"


def problem(message: str, kind: str, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


class Handler(BaseHTTPRequestHandler):
    fake: FakeNode

    def log_message(self, *args: object) -> None:
        """Tests read stderr: say nothing there."""

    def refused(self) -> bool:
        wanted = self.fake.api_key
        wrong = bool(wanted) and self.headers["Authorization"] != f"Bearer {wanted}"
        if wrong:
            self.reply(401, problem("wrong key", "authentication_error", "invalid_api_key"))
        return wrong

    def reply(self, status: int, body: dict[str, Any]) -> None:
        raw = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def do_GET(self) -> None:
        if not self.refused():
            self.reply(*self.fake.got(self.path))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.fake.asked.append((self.path, body))
        chat = self.path.endswith("/chat/completions")
        if chat and self.fake.chat_error is not None:
            self.reply(400, self.fake.chat_error)
        elif not self.refused():
            self.stream(chat)

    def stream(self, chat: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for event in list(self.fake.events(chat))[: self.fake.cut_after]:
            self.wfile.write(f"data: {event}\n\n".encode())


@contextmanager
def serving(fake: FakeNode) -> Iterator[FakeNode]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"fake": fake}))
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def main() -> None:
    """A process that behaves like `shoal up --json --exit-with-parent`."""
    with serving(FakeNode()) as fake:
        ready = {"node": AMBER, "name": "amber-fox", "api": fake.url, "ticket": None, "relay": None}
        print(json.dumps(ready), flush=True)  # noqa: T201
        sys.stdin.read()


if __name__ == "__main__":
    main()
