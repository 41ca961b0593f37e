"""What splitting a model over processes costs: decode tokens/s of 1, 2 and 3 stages at batch 1.

Real `shoal up` processes on loopback, asked over HTTP by one client, against the peer: the same
slice code (`engine.Stage`) with all layers in one process, called in a bare loop. Random weights at
real shapes, int8 by default since it leaves the least time to hide overhead in; every process
computes with the same number of threads. All variants are up during the whole run and take turns.

A second peer tells what no pipeline can avoid: two processes that compute one half each in turn and
hand each other raw bytes over a pipe, with nothing else around. A core that has waited for the
other half streams weights more slowly for some milliseconds; that is in both.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

from contract import Bench
from live import complete, mesh, write_model
from shapes import SHAPES

SPLITS = {
    "SmolLM2-135M": {1: ["0:30"], 2: ["0:17", "17:30"], 3: ["0:12", "12:23", "23:30"]},
    "TinyLlama-1.1B": {1: ["0:22"], 2: ["0:11", "11:22"], 3: ["0:8", "8:15", "15:22"]},
}
BARE, HALVES = 0, -2
VARIANTS = {BARE: "bare loop", HALVES: "two bare halves over a pipe"}
PROMPT = list(range(3, 131))  # 128 token ids


def bare_loop(model: Path, quant: str, threads: int) -> None:
    """The peer's process: reads how many tokens are wanted, prints the seconds of each."""
    import torch

    from shoal.engine.request import Sampling
    from shoal.engine.rows import Row
    from shoal.engine.sampling import SamplerState
    from shoal.engine.stage import Stage, StageConfig
    from shoal.models.checkpoint import open_checkpoint
    from shoal.models.slice import load_slice
    from shoal.units import SessionId

    torch.set_num_threads(threads)
    checkpoint = open_checkpoint(str(model))
    stage = Stage(load_slice(checkpoint, checkpoint.whole, quant=quant), StageConfig(pages=64))
    session, pages = SessionId("bench"), tuple(range(64))
    print("ready", flush=True)
    for line in sys.stdin:
        sampler = SamplerState(Sampling(temperature=0, max_tokens=10**6), PROMPT)
        row = Row(session, 0, pages, len(PROMPT), PROMPT, None, sampler)
        took = []
        for position in range(len(PROMPT), len(PROMPT) + int(line)):
            started = time.perf_counter()
            (chosen,) = stage.step([row]).sampled[0]
            took.append(time.perf_counter() - started)
            row = Row(session, position, pages, 1, (chosen.token,), None, sampler)
        print(statistics.median(took[1:]), flush=True)


def half_loop(model: Path, layers: str, quant: str, threads: int, read: int, write: int) -> None:
    """One half of the second peer. The first counts, the last answers until the pipe ends."""
    import torch

    from shoal.engine.rows import Row
    from shoal.engine.stage import Stage, StageConfig
    from shoal.models.checkpoint import open_checkpoint
    from shoal.models.slice import load_slice
    from shoal.units import SessionId, Slice

    torch.set_num_threads(threads)
    own = load_slice(open_checkpoint(str(model)), Slice.parse(layers), quant=quant)
    stage, pages = Stage(own, StageConfig(pages=64)), tuple(range(64))
    token, hidden_bytes = b"\0" * 4, own.hidden_size * own.dtype.itemsize

    def step(position: int, data: bytes) -> bytes | memoryview:
        hidden = None if own.first else stage.hidden_from_wire(data, 1)
        row = Row(SessionId("bench"), position, pages, 1, (5,) if own.first else None, hidden)
        if own.last:
            stage.logits([row], [0]).argmax()
            return token
        return stage.hidden_to_wire(stage.step([row]), [row], [0])

    print("ready", flush=True)
    if own.last:
        position = 0
        while data := read_exactly(read, hidden_bytes):
            os.write(write, step(128 + position % 64, data))
            position += 1
        return
    for line in sys.stdin:
        took = []
        for position in range(int(line)):
            started = time.perf_counter()
            os.write(write, step(128 + position % 64, b""))
            read_exactly(read, len(token))
            took.append(time.perf_counter() - started)
        print(statistics.median(took[1:]), flush=True)


def read_exactly(file: int, count: int) -> bytes:
    data = b""
    while len(data) < count and (more := os.read(file, count - len(data))):
        data += more
    return data


def start_halves(
    stack: ExitStack, model: Path, slices: Sequence[str], quant: str, threads: int
) -> subprocess.Popen[str]:
    """Both halves; returns the first one, which counts."""
    (there_read, there_write), (back_read, back_write) = os.pipe(), os.pipe()
    ends = ((back_read, there_write), (there_read, back_write))
    processes = []
    for layers, (read, write) in zip(slices, ends, strict=True):
        command = [sys.executable, __file__, "--bare", str(model), "--half", layers]
        command += ["--quant", quant, "--threads", str(threads), "--pipe", str(read), str(write)]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=(read, write),
        )
        stack.callback(process.kill)
        processes.append(process)
    for file in (there_read, there_write, back_read, back_write):
        os.close(file)
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    return processes[0]


def start_bare_loop(model: Path, quant: str, threads: int) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--bare", str(model)]
    command += ["--quant", quant, "--threads", str(threads)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def seconds_a_token(process: subprocess.Popen[str], tokens: int) -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    print(tokens, file=process.stdin, flush=True)
    return float(process.stdout.readline())


def measure(bench: Bench, name: str, folder: Path, rounds: int, tokens: int) -> None:
    quant, threads = bench.options.quant, bench.options.threads
    model = folder / name
    write_model(model, SHAPES[name])
    with ExitStack() as stack:
        bare = stack.enter_context(start_bare_loop(model, quant, threads))
        stack.callback(bare.kill)
        apis = {
            stages: stack.enter_context(
                mesh(
                    folder / f"{name}-{stages}",
                    model,
                    cut,
                    *("--quant", quant, "--draft", "none"),  # one token a pass
                    threads=threads,
                )
            )
            for stages, cut in SPLITS[name].items()
        }
        halves = start_halves(stack, model, SPLITS[name][2], quant, threads)
        seen: dict[int, list[float]] = {stages: [] for stages in (BARE, HALVES, *apis)}
        for _ in range(rounds):
            seen[BARE].append(seconds_a_token(bare, tokens))
            seen[HALVES].append(seconds_a_token(halves, tokens))
            for stages, api in apis.items():
                _, came = complete(api, name, PROMPT, tokens)
                gaps = [after - before for before, after in pairwise(came)]
                seen[stages].append(statistics.median(gaps))
    report(bench, name, seen)


def report(bench: Bench, name: str, seen: dict[int, list[float]]) -> None:
    """Ratios are made round by round, then the median is taken: the machine's speed drifts."""
    for stages, seconds in seen.items():
        bench.row(
            what=f"{name}, {VARIANTS.get(stages) or f'{stages} nodes'}",
            tokens_per_s=1 / statistics.median(seconds),
            ms_a_token=1e3 * statistics.median(seconds),
            slowest_ms=1e3 * max(seconds),
            ratio=against(seen[BARE], seconds),
            to_halves=against(seen[HALVES], seconds),
        )
    for peer in (BARE, HALVES):
        ratio = against(seen[peer], seen[2])
        bench.aim(f"{name}: 2 nodes / {VARIANTS[peer]}", ">= 0.9", got=ratio, holds=ratio >= 0.9)


def against(peer: Sequence[float], seconds: Sequence[float]) -> float:
    return statistics.median(theirs / ours for theirs, ours in zip(peer, seconds, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quant", default="int8", choices=["none", "int8"])
    parser.add_argument("--threads", type=int, default=1, help="of every process")
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--half", help=argparse.SUPPRESS)
    parser.add_argument("--pipe", type=int, nargs=2, help=argparse.SUPPRESS)
    bench = Bench("pipeline", __doc__, parser=parser)
    told = bench.options
    if told.half:
        half_loop(told.bare, told.half, told.quant, told.threads, *told.pipe)
        return
    if told.bare:
        bare_loop(told.bare, told.quant, told.threads)
        return
    names = list(SHAPES)[:1] if bench.quick else list(SHAPES)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            measure(bench, name, Path(folder), rounds=3 if bench.quick else 9, tokens=64)
    bench.finish()


if __name__ == "__main__":
    main()
