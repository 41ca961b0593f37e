"""Node processes for benchmarks: started, waited for, ended. Only what the scripts share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from shoal.cli.demo import free_port

START_S = 600.0


def write_model(folder: Path, config: dict[str, Any]) -> None:
    """A checkpoint with random bf16 weights and a tokenizer in which each id is a word."""
    from shoal.models.random_checkpoint import write_random_checkpoint

    write_random_checkpoint(config, folder, dtype="bfloat16", shard="2GB")
    words = {f"t{token}": token for token in range(config["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Metaspace(replacement=" ", prepend_scheme="never")
    tokenizer.save(str(folder / "tokenizer.json"))


@dataclass(frozen=True, slots=True)
class Node:
    """One `shoal up` process: its own, the address of its API, where its stderr goes."""

    process: subprocess.Popen[bytes]
    api: str
    log: Path


@contextmanager
def mesh(
    folder: Path, model: Path, slices: Sequence[str], *options: str, threads: int = 1
) -> Iterator[str]:
    """One node a slice; gives the address of the first one's API once the model is covered."""
    with nodes(folder, str(model), slices, *options, threads=threads) as found:
        yield found[0].api


@contextmanager
def nodes(
    folder: Path, model: str, slices: Sequence[str], *options: str, threads: int = 1
) -> Iterator[list[Node]]:
    """One node a slice, each with a home in `folder`, once every one sees the model covered."""
    port = free_port()
    processes = []
    try:
        for number, layers in enumerate(slices):
            wanted = ["--model", model, "--layers", layers, *options]
            home = folder / f"node{number}"
            processes.append(start(home, port, wanted, relay=number == 0, threads=threads))
        homes = [folder / f"node{number}" for number in range(len(slices))]
        apis = [_wait(home / "out", processes) for home in homes]
        yield [
            Node(process, api, home / "err")
            for process, api, home in zip(processes, apis, homes, strict=True)
        ]
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


def start(
    home: Path, port: int, wanted: Sequence[str], *, relay: bool = False, threads: int = 1
) -> subprocess.Popen[bytes]:
    """`shoal up` in the mesh whose relay listens on `port`; with `relay` it brings that along."""
    home.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "shoal", "up", "--json", "--no-lan", "--port", "0"]
    command += ["--listen", "127.0.0.1:0", "--threads", str(threads), "--mesh", "bench"]
    command += ["--relay-port", str(port)] if relay else ["--relay", f"ws://127.0.0.1:{port}"]
    with (home / "out").open("w") as out, (home / "err").open("w") as err:
        environment = {**os.environ, "SHOAL_HOME": str(home), "SHOAL_DEBUG": "1"}
        return subprocess.Popen([*command, *wanted], stdout=out, stderr=err, env=environment)


def _wait(out: Path, processes: Sequence[subprocess.Popen[bytes]]) -> str:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if any(process.poll() is not None for process in processes):
            raise RuntimeError(f"a node ended; see {out.parent.parent}")
        line, newline, _ = out.read_text().partition("\n")
        if newline:
            api: str = json.loads(line)["api"]
            with urlopen(f"{api}/v1/mesh") as answer:  # noqa: S310 - our own node
                if any(found["ready"] for found in json.load(answer)["models"]):
                    return api
        time.sleep(0.2)
    raise TimeoutError(f"no mesh within {START_S:.0f} s; see {out.parent.parent}")


def complete(api: str, model: str, prompt: Sequence[int], tokens: int) -> tuple[float, list[float]]:
    """Stream one greedy completion; returns (seconds to the first token, when each one came)."""
    body = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
    }
    request = Request(  # noqa: S310 - our own node
        f"{api}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    started = time.perf_counter()
    came = []
    with urlopen(request) as answer:  # noqa: S310
        for line in answer:
            if line.startswith(b"data: {"):
                came.append(time.perf_counter())
    assert len(came) >= tokens, f"{len(came)} events for {tokens} tokens"
    return came[0] - started, came[:tokens]
