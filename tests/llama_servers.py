"""Real servers on loopback, as processes of their own: llama.cpp's, and llama-cpp-python's."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from .needs import needs

START_S = 60.0
LLAMA_SERVER = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port = sys.argv[1], int(sys.argv[2])
params.n_ctx, params.n_parallel, params.kv_unified = 2048, 2, True
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.warmup, params.n_gpu_layers, params.verbosity = False, 0, -1
server = xllamacpp.Server(params)
time.sleep(600)
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


@contextmanager
def llama_server(model: Path, port: int | None = None) -> Iterator[str]:
    """llama.cpp's own server, which the wheel `xllamacpp` brings along."""
    needs("xllamacpp", "gguf")
    port = port or free_port()
    with _running([sys.executable, "-c", LLAMA_SERVER, str(model), str(port)], port) as url:
        yield url


@contextmanager
def llama_python_server(model: Path) -> Iterator[str]:
    """The server of llama-cpp-python, which takes and gives text only."""
    needs("llama_cpp", "gguf", "fastapi", "sse_starlette", "starlette_context", "pydantic_settings")
    port = free_port()
    command = [sys.executable, "-W", "ignore", "-m", "llama_cpp.server", "--n_threads", "1"]
    command += ["--n_ctx", "1024", "--model", str(model), "--port", str(port)]
    with _running([*command, "--host", "127.0.0.1"], port) as url:
        yield url


@contextmanager
def _running(command: list[str], port: int) -> Iterator[str]:
    url = f"http://127.0.0.1:{port}"
    quiet = subprocess.DEVNULL
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=quiet, stderr=quiet, env=environment)
    try:
        _wait_for(url, process)
        yield url
    finally:
        process.kill()
        process.wait()


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while True:
        assert process.poll() is None, "the server ended"
        assert time.monotonic() < deadline, "the server does not answer"
        try:
            if httpx.get(f"{url}/v1/models", timeout=5, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
