"""What splitting a model over processes costs: decode tokens/s of 1, 2 and 3 stages at batch 1.

Real `shoal up` processes on loopback, asked over HTTP by one client, against the peer: the same
slice code (`engine.Stage`) with all layers in one process, called in a bare loop. Random weights at
real shapes, int8 by default since it leaves the least time to hide overhead in; every process
computes with the same number of threads. All variants are up during the whole run and take turns.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

from contract import Bench
from live import complete, mesh, write_model

COMMON = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHAPES = {
    "SmolLM2-135M": COMMON
    | {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "TinyLlama-1.1B": COMMON
    | {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
}
SPLITS = {
    "SmolLM2-135M": {1: ["0:30"], 2: ["0:17", "17:30"], 3: ["0:12", "12:23", "23:30"]},
    "TinyLlama-1.1B": {1: ["0:22"], 2: ["0:11", "11:22"], 3: ["0:8", "8:15", "15:22"]},
}
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
            chosen = stage.step([row]).sampled[0]
            took.append(time.perf_counter() - started)
            assert chosen is not None
            row = Row(session, position, pages, 1, (chosen.token,), None, sampler)
        print(statistics.median(took[1:]), flush=True)


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
                mesh(folder / f"{name}-{stages}", model, cut, "--quant", quant, threads=threads)
            )
            for stages, cut in SPLITS[name].items()
        }
        seen: dict[int, list[float]] = {stages: [] for stages in (0, *apis)}
        for _ in range(rounds):
            seen[0].append(seconds_a_token(bare, tokens))
            for stages, api in apis.items():
                _, came = complete(api, name, PROMPT, tokens)
                gaps = [after - before for before, after in pairwise(came)]
                seen[stages].append(statistics.median(gaps))
    report(bench, name, seen)


def report(bench: Bench, name: str, seen: dict[int, list[float]]) -> None:
    """Ratios are made round by round, then the median is taken: the machine's speed drifts."""
    for stages, seconds in seen.items():
        ratios = [bare / one for bare, one in zip(seen[0], seconds, strict=True)]
        bench.row(
            what=f"{name}, {f'{stages} processes' if stages else 'bare loop'}",
            tokens_per_s=1 / statistics.median(seconds),
            ms_a_token=1e3 * statistics.median(seconds),
            slowest_ms=1e3 * max(seconds),
            ratio=statistics.median(ratios),
        )
        if stages == 2:
            ratio = statistics.median(ratios)
            bench.aim(f"{name}: 2 stages / bare loop", ">= 0.9", got=ratio, holds=ratio >= 0.9)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quant", default="int8", choices=["none", "int8"])
    parser.add_argument("--threads", type=int, default=1, help="of every process")
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    bench = Bench("pipeline", __doc__, parser=parser)
    if bench.options.bare:
        bare_loop(bench.options.bare, bench.options.quant, bench.options.threads)
        return
    names = list(SHAPES)[:1] if bench.quick else list(SHAPES)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            measure(bench, name, Path(folder), rounds=3 if bench.quick else 9, tokens=64)
    bench.finish()


if __name__ == "__main__":
    main()
