"""How fast one process computes a whole model on the CPU, against llama.cpp and transformers.

Decode tokens/s at batch 1, 8 and 32 with a context of 128, prefill of 128 and 1024 tokens, time to
load and peak memory, in the shapes of SmolLM2-135M and TinyLlama-1.1B with random weights. The
sliced stage itself is measured (`engine.Stage`), with its batch building and logits, sampling left
out on both sides. Each variant is a process of its own, all are loaded at once and take turns: a
round asks each of them once, and the best and the median of the rounds are reported.

Peers: llama.cpp through llama-cpp-python (built from source on this machine), on GGUF files of the
same shapes; `generate` of transformers in bf16. The limit is weight bytes over the bandwidth that
a plain read of memory reaches on this machine with as many threads.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from contract import Bench
from live import write_model
from shapes import SHAPES

CONTEXT = 128
BATCHES = (1, 8, 32)
PREFILLS = (128, 1024)
PAGE = 16

# ---- the processes: each loads, says so, and answers {"decode": B} or {"prefill": N} with seconds

Answer = Callable[[dict[str, int]], float]


def serve(load: Callable[[], Answer]) -> None:
    import resource

    started = time.perf_counter()
    answer = load()
    print(json.dumps({"load_s": time.perf_counter() - started}), flush=True)
    for line in sys.stdin:
        seconds = answer(json.loads(line))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "peak_bytes": peak}), flush=True)


def load_shoal(folder: str, quant: str, threads: int) -> Answer:
    from shoal.engine.pages import PagePool
    from shoal.engine.rows import Row
    from shoal.engine.stage import Stage, StageConfig
    from shoal.engine.thread import set_threads
    from shoal.models.checkpoint import open_checkpoint
    from shoal.models.slice import load_slice
    from shoal.units import SessionId

    set_threads(threads)
    checkpoint = open_checkpoint(folder)
    each = -(-(CONTEXT + 128) // PAGE)
    pages = max(BATCHES) * each + max(PREFILLS) // PAGE
    stage = Stage(
        load_slice(checkpoint, checkpoint.whole, None, quant),  # type: ignore[arg-type]
        StageConfig(page_size=PAGE, pages=pages),
    )
    pool = PagePool(pages, PAGE)
    own = [pool.allocate(each * PAGE) for _ in range(max(BATCHES))]
    long = pool.allocate(max(PREFILLS))
    at = CONTEXT

    def answer(asked: dict[str, int]) -> float:
        nonlocal at
        if count := asked.get("prefill", 0):
            rows = [Row(SessionId("long"), 0, long, count, list(range(3, count + 3)))]
        else:
            at = CONTEXT + (at + 1) % 64
            rows = [Row(SessionId(f"{n}"), at, own[n], 1, [n + 3]) for n in range(asked["decode"])]
        started = time.perf_counter()
        stage.logits(rows, range(len(rows)))
        return time.perf_counter() - started

    for n in range(max(BATCHES)):
        stage.logits([Row(SessionId(f"{n}"), 0, own[n], CONTEXT, list(range(3, CONTEXT + 3)))], [0])
    return answer


def load_llama(path: str, threads: int) -> Answer:
    import llama_cpp as lc

    lc.llama_backend_init()
    silent = lc.llama_log_callback(lambda *_: None)
    lc.llama_log_set(silent, None)
    model = lc.llama_model_load_from_file(path.encode(), lc.llama_model_default_params())
    how = lc.llama_context_default_params()
    how.n_ctx = max(BATCHES) * (CONTEXT + 128) + max(PREFILLS)
    how.n_batch = how.n_ubatch = max(PREFILLS)
    how.n_seq_max = max(BATCHES) + 1
    how.n_threads = how.n_threads_batch = threads
    how.kv_unified, how.flash_attn_type = True, 1
    context = lc.llama_init_from_model(model, how)
    memory = lc.llama_get_memory(context)
    at, kept = CONTEXT, silent  # the callback must not be collected

    def step(positions: Sequence[int], sequences: Sequence[int], wanted: Sequence[int]) -> float:
        count = len(positions)
        batch = lc.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for i in range(count):
            batch.token[i], batch.pos[i] = 3 + i, positions[i]
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequences[i]
            batch.logits[i] = i in wanted
        started = time.perf_counter()
        if lc.llama_decode(context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        lc.llama_synchronize(context)
        took = time.perf_counter() - started
        lc.llama_batch_free(batch)
        return took

    def answer(asked: dict[str, int]) -> float:
        nonlocal at
        if count := asked.get("prefill", 0):
            last = max(BATCHES)
            lc.llama_memory_seq_rm(memory, last, -1, -1)
            return step(range(count), [last] * count, [count - 1])
        size = asked["decode"]
        for n in range(size):  # each goes on from its context
            lc.llama_memory_seq_rm(memory, n, CONTEXT, -1)
        return step([CONTEXT] * size, range(size), range(size))

    step(range(CONTEXT), [0] * CONTEXT, [CONTEXT - 1])
    for n in range(1, max(BATCHES)):  # all share the context of the first: less to read for them
        lc.llama_memory_seq_cp(memory, 0, n, -1, -1)
    assert kept is silent
    return answer


def load_transformers(folder: str, threads: int) -> Answer:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    tokens = 8

    def generate(batch: int, prompt: int, new: int) -> float:
        ids = torch.arange(3, prompt + 3).repeat(batch, 1)
        started = time.perf_counter()
        model.generate(ids, max_new_tokens=new, do_sample=False, pad_token_id=0)
        return time.perf_counter() - started

    def answer(asked: dict[str, int]) -> float:
        if count := asked.get("prefill", 0):
            return generate(1, count, 1)
        size = asked["decode"]  # the time of `tokens` steps, without that of the prompt
        longer, shorter = generate(size, CONTEXT, tokens + 1), generate(size, CONTEXT, 1)
        return max(longer - shorter, 1e-9) / tokens

    return answer


class Variant:
    """One of the processes."""

    def __init__(self, what: str, arguments: Sequence[str], environment: dict[str, str]) -> None:
        self.what = what
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | environment,
            text=True,
        )
        self.load_s: float = self._read()["load_s"]
        self.peak_bytes = 0
        self.seconds: dict[str, list[float]] = {}

    def ask(self, kind: str, count: int, repeats: int) -> None:
        """The best of some repeats is one sample."""
        assert self.process.stdin is not None
        taken = []
        for _ in range(repeats):
            self.process.stdin.write(json.dumps({kind: count}) + "\n")
            self.process.stdin.flush()
            found = self._read()
            taken.append(found["seconds"])
            self.peak_bytes = found["peak_bytes"]
        self.seconds.setdefault(f"{kind} {count}", []).append(min(taken))

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.what} ended")
        found: dict[str, Any] = json.loads(line)
        return found

    def rate(self, kind: str, count: int) -> float:
        """Tokens/s, from the median of the rounds."""
        return count / statistics.median(self.seconds[f"{kind} {count}"])

    def spread(self, what: str) -> float:
        taken = self.seconds[what]
        return statistics.median(taken) / min(taken)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


# ---- the run


def variants_of(shape: str, folder: Path, bench: Bench) -> Iterator[tuple[str, list[str], dict]]:
    model = folder / shape
    if not (model / "config.json").exists():
        model.mkdir(parents=True, exist_ok=True)
        write_model(model, SHAPES[shape])
    for quant in ("none", "int8", "int4"):
        yield f"shoal {quant}", ["shoal", str(model), quant], {}
    yield "shoal int8, plain torch", ["shoal", str(model), "int8"], {"SHOAL_KERNELS": "off"}
    if importlib.util.find_spec("llama_cpp") and importlib.util.find_spec("gguf"):
        from gguf_shapes import write_gguf

        for kind in ("BF16", "Q8_0", "Q4_0"):
            path = folder / f"{shape}-{kind}.gguf"
            if not path.exists():
                write_gguf(path, SHAPES[shape], kind)
            yield f"llama.cpp {kind}", ["llama", str(path)], {}
    else:
        bench.absent("llama.cpp", "llama-cpp-python and gguf are not installed")
    yield "transformers bf16", ["transformers", str(model)], {}


@contextmanager
def running(shape: str, folder: Path, threads: int, bench: Bench) -> Iterator[dict[str, Variant]]:
    with ExitStack() as stack:
        found = {}
        words = (bench.options.only or "").split(",")
        for what, arguments, environment in variants_of(shape, folder, bench):
            if not any(word in what for word in words):
                continue
            omp = {"OMP_NUM_THREADS": str(threads)}
            variant = Variant(what, [*arguments, str(threads)], omp | environment)
            stack.callback(variant.close)
            found[what] = variant
        yield found


def measure(variants: dict[str, Variant], rounds: int, long_prompts: bool) -> None:
    for round_ in range(rounds):
        for kind, counts in (("decode", BATCHES), ("prefill", PREFILLS)):
            for count in counts:
                for variant in variants.values():
                    slow = variant.what.startswith("transformers")
                    if (count > 128 and not long_prompts) or (slow and (round_ or count == 32)):
                        continue
                    repeats = 1 if slow else {1: 12, 8: 5, 32: 3, 128: 2}.get(count, 1)
                    variant.ask(kind, count, repeats)


def report(bench: Bench, shape: str, variants: dict[str, Variant], read_rate: float) -> None:
    for what, variant in variants.items():
        values: dict[str, float] = {}
        for key in variant.seconds:
            kind, count = key.split()
            name = f"B={count}" if kind == "decode" else f"prefill_{count}"
            values[name] = variant.rate(kind, int(count))
        weights = weight_bytes(SHAPES[shape], what)
        limit = read_rate / weights
        bench.row(
            what=f"{shape} {what}",
            **{f"{name}_tok_s": round(rate, 1) for name, rate in values.items()},
            of_limit=round(values["B=1"] / limit, 2),
            spread=round(max(map(variant.spread, variant.seconds)), 2),
            load_s=round(variant.load_s, 1),
            peak_MB=variant.peak_bytes // 10**6,
        )


def weight_bytes(config: dict[str, Any], what: str) -> float:
    """What one token reads: layers and head."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    width = hidden // heads
    layer = hidden * width * (2 * heads + 2 * kv_heads) + 3 * hidden * config["intermediate_size"]
    head = hidden * config["vocab_size"]
    each = {"int8": 1, "int4": 4.25 / 8, "Q8_0": 34 / 32, "Q4_0": 18 / 32}
    size = next((each[kind] for kind in each if kind in what), 2)
    return layers * layer * size + head * (1 if "int4" in what else size)


def read_bandwidth(threads: int) -> float:
    """Bytes/s of a plain read of more memory than any cache holds."""
    import torch

    torch.set_num_threads(threads)
    data = torch.ones(1 << 27)
    best = min(_timed(data.sum) for _ in range(5))
    return data.nbytes / best


def _timed(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


AIMS: dict[str, list[tuple[str, str, str, str, int, float]]] = {
    "TinyLlama-1.1B": [
        ("shoal int8", "llama.cpp Q8_0", "decode", "B=1", 1, 1.5),
        ("shoal int4", "llama.cpp Q4_0", "decode", "B=1", 1, 1.25),
        *(
            (ours, peer, kind, name, count, 2.5)
            for ours, peer in (("shoal int8", "llama.cpp Q8_0"), ("shoal int4", "llama.cpp Q4_0"))
            for kind, name, count in (
                ("decode", "B=8", 8),
                ("decode", "B=32", 32),
                ("prefill", "prefill 128", 128),
                ("prefill", "prefill 1024", 1024),
            )
        ),
        ("shoal int8, plain torch", "llama.cpp Q8_0", "decode", "B=1", 1, 0.9),
        ("shoal int8, plain torch", "llama.cpp Q8_0", "decode", "B=8", 8, 2.0),
    ],
    "SmolLM2-135M": [
        (ours, peer, kind, name, count, least)
        for ours, peer in (("shoal int8", "llama.cpp Q8_0"), ("shoal int4", "llama.cpp Q4_0"))
        for kind, name, count, least in (
            ("decode", "B=1", 1, 1.0),
            ("decode", "B=8", 8, 1.3),
            ("decode", "B=32", 32, 1.3),
            ("prefill", "prefill 128", 128, 2.0),
            ("prefill", "prefill 1024", 1024, 2.0),
        )
    ],
}


def check_aims(bench: Bench, shape: str, variants: dict[str, Variant]) -> None:
    for ours, peer, kind, name, count, least in AIMS[shape]:
        if peer not in variants or f"{kind} {count}" not in variants[ours].seconds:
            continue
        got = variants[ours].rate(kind, count) / variants[peer].rate(kind, count)
        bench.aim(f"{shape} {name}: {ours} / {peer}", f">= {least}", got=got, holds=got >= least)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--shape", choices=sorted(SHAPES), help="only this one")
    parser.add_argument("--folder", type=Path, help="keep the models there, and find them again")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="variants whose names have one of these words in them")
    bench = Bench("engine", __doc__, parser=parser)
    options = bench.options
    rounds = 2 if bench.quick else options.rounds
    read_rate = read_bandwidth(options.threads)
    bench.row(what=f"a plain read, {options.threads} threads", GB_s=round(read_rate / 1e9, 1))
    with tempfile.TemporaryDirectory() as kept:
        for shape in SHAPES if options.shape is None else [options.shape]:
            if bench.quick and shape != "SmolLM2-135M":
                continue
            folder = options.folder or Path(kept)
            with running(shape, folder, options.threads, bench) as variants:
                measure(variants, rounds, long_prompts=not bench.quick)
                report(bench, shape, variants, read_rate)
                check_aims(bench, shape, variants)
    bench.finish()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        kind, *rest = sys.argv[2:]
        loads: dict[str, Callable[..., Answer]] = {
            "shoal": load_shoal,
            "llama": load_llama,
            "transformers": load_transformers,
        }
        *given, threads_ = rest
        serve(lambda: loads[kind](*given, int(threads_)))
    else:
        main()
