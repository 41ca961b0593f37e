"""Real node processes on loopback, each with a home of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

START_S = 90.0  # torch is imported once a process, on machines that are busy with other tests


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


@dataclass
class LiveNode:
    """One `shoal up` process."""

    process: subprocess.Popen[str]
    home: Path
    layers: str
    ready: dict[str, str]

    @property
    def api(self) -> str:
        return self.ready["api"]

    def status(self) -> dict:
        return httpx.get(f"{self.api}/v1/node", timeout=10).json()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def leave(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=15)

    def stderr(self) -> str:
        return (self.home / "stderr").read_text()


def start_node(home: Path, *options: str, lan: bool = False) -> subprocess.Popen[str]:
    home.mkdir(parents=True)
    command = [sys.executable, "-m", "shoal", "up", "--json", "--listen", "127.0.0.1:0"]
    command += [] if lan else ["--no-lan"]
    environment = {**os.environ, "SHOAL_HOME": str(home), "OMP_NUM_THREADS": "1"}
    with (home / "stdout").open("w") as out, (home / "stderr").open("w") as err:
        return subprocess.Popen(
            [*command, "--port", "0", "--threads", "1", *options],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=environment,
            text=True,
        )


def wait_for(what: str, happened, patience_s: float = START_S):
    """Wait until `happened()` is true and return it; processes have no events to wait for."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        if found := happened():
            return found
        time.sleep(0.05)
    raise AssertionError(f"{what}: not within {patience_s} s")


def ready_line(process: subprocess.Popen[str], home: Path) -> dict[str, str] | None:
    if process.poll() is not None:
        raise AssertionError(f"the node ended: {(home / 'stderr').read_text()[-3000:]}")
    line, newline, _ = (home / "stdout").read_text().partition("\n")
    return json.loads(line) if newline else None


def model_is_ready(node: LiveNode) -> bool:
    try:
        models = httpx.get(f"{node.api}/v1/mesh", timeout=10).json()["models"]
    except httpx.HTTPError:
        return False
    return any(model["ready"] for model in models)


def everyone_sees_everyone(nodes: Sequence[LiveNode]) -> bool:
    return all(
        len(httpx.get(f"{node.api}/v1/mesh", timeout=10).json()["nodes"]) == len(nodes)
        for node in nodes
    )


@contextmanager
def live_mesh(
    folder: Path, slices: Sequence[str], *options: str, model: str = "shoal-tiny"
) -> Iterator[list[LiveNode]]:
    """One node for each of `slices` ("0:3", or "" for a gateway only); the first runs the relay."""
    port = free_port()
    nodes: list[LiveNode] = []
    processes: list[subprocess.Popen[str]] = []
    try:
        for number, layers in enumerate(slices):
            relay = (
                ["--relay-port", str(port)]
                if number == 0
                else ["--relay", f"ws://127.0.0.1:{port}"]
            )
            slice_options = ["--layers", layers] if layers else ["--no-serve"]
            home = folder / f"node{number}"
            process = start_node(home, *relay, "--model", model, *slice_options, *options)
            processes.append(process)
            nodes.append(LiveNode(process, home, layers, {}))
        for node in nodes:
            node.ready = wait_for(
                "a node starts", lambda node=node: ready_line(node.process, node.home)
            )
        wait_for("the nodes see each other", lambda: everyone_sees_everyone(nodes))
        wait_for("the model is ready", lambda: all(model_is_ready(node) for node in nodes))
        yield nodes
    finally:
        for process in processes:
            process.kill()
            process.wait()
