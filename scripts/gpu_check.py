"""Does a GPU compute what it should, and how fast? One command, at most eight minutes:

    pip install -e ".[engine]" && python scripts/gpu_check.py

First it is asked for the CPU's bits: every piece of the exact class, then tiny models of several
families, whole schedules of prompts and tokens. Then recorded steps are compared with others. Last
it decodes and reads prompts in the shape of a model of 1.2 billion weights, which are random. What
is printed belongs into docs/build/log.md. `--device cpu --quick` rehearses it without a GPU.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from shoal.engine.graphs import Play, Record
from shoal.engine.rows import Row
from shoal.engine.schedule import make_prompts, make_stages, run_schedule
from shoal.engine.stage import Stage, StageConfig
from shoal.exact.devices import computes_exactly
from shoal.models.checkpoint import Checkpoint, open_checkpoint
from shoal.models.random_checkpoint import write_random_checkpoint
from shoal.models.slice import load_slice
from shoal.units import Quant, SessionId

ROOT = Path(__file__).parents[1]
ASKED = ("llama", "qwen3", "gemma2", "mixtral", "deepseek_v2", "gpt_oss")
BUDGET_S = 7.5 * 60
SHAPE = {  # Llama 3.2 1B
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 1000}
BATCHES, CONTEXT, PROMPT, STEPS = (1, 8, 32), 512, 1024, 20
VARIANTS: Sequence[tuple[Quant, bool]] = (
    ("none", False),
    ("none", True),
    ("w8", True),
    ("w4", True),
    ("int8", True),
    ("int4", True),
)
PAGE = 16
NOT_WANTED = "computed without"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--quick", action="store_true", help="a small shape")
    told = parser.parse_args()
    if told.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"torch {torch.__version__} finds no CUDA GPU here; try: --device cpu --quick")
        return 2
    end = time.monotonic() + BUDGET_S
    logging.getLogger("shoal.engine.graphs").addFilter(lambda it: NOT_WANTED not in it.getMessage())
    print(f"torch {torch.__version__}, {name_of(told.device)}\n")
    print(f"pieces of the exact class: {verdict(computes_exactly(told.device))}")
    fine = computes_exactly(told.device)
    sys.path.insert(0, str(ROOT))
    from tests.models.families import FAMILIES

    with tempfile.TemporaryDirectory() as folder:
        for family in ASKED:
            checkpoint = tiny(FAMILIES[family], Path(folder) / family)
            for line, right in compared(checkpoint, told.device):
                print(f"{family}, {line}: {verdict(right)}", flush=True)
                fine = fine and right
        measure(told.device, Path(folder) / "large", end, quick=told.quick)
    return 0 if fine else 1


def verdict(right: bool) -> str:
    return "ok" if right else "DIFFERENT"


def name_of(device: str) -> str:
    if device.startswith("cuda"):
        memory = torch.cuda.get_device_properties(device).total_memory
        return f"{torch.cuda.get_device_name(device)}, {memory / 1e9:.0f} GB"
    return device


# ---- is it right?


def tiny(config: dict[str, object], folder: Path) -> Checkpoint:
    write_random_checkpoint(config, folder)
    return open_checkpoint(str(folder))


def compared(checkpoint: Checkpoint, device: str) -> Iterator[tuple[str, bool]]:
    prompts = make_prompts(checkpoint.vocab_size)
    kinds: tuple[Quant, ...] = ("int8", "int4")
    for quant in kinds:
        here = run_schedule(make_stages(checkpoint, (0.5,), quant), prompts)
        there = run_schedule(make_stages(checkpoint, (0.5,), quant, device=device), prompts)
        pairs = [(a.logits, b.logits.cpu()) for a, b in zip(here, there, strict=True)]
        yield f"{quant} as on the CPU, bit for bit", all(torch.equal(*pair) for pair in pairs)
        yield f"{quant} recorded as not, bit for bit", worst(checkpoint, device, quant) == 0.0
    here = run_schedule(make_stages(checkpoint, ()), prompts)
    there = run_schedule(make_stages(checkpoint, (), device=device), prompts)
    errors = [difference(a.logits, b.logits) for a, b in zip(here, there, strict=True)]
    yield "f32 as on the CPU, but for rounding", max(errors) < 1e-2  # TF32 may be allowed
    yield "f32 recorded as not, but for rounding", worst(checkpoint, device, "none") < 1e-2


def worst(checkpoint: Checkpoint, device: str, quant: Quant) -> float:
    """The largest difference between steps that were recorded and others."""
    pair = [stage_of(checkpoint, device, quant, 64, recorded=on) for on in (True, False)]
    ids = make_prompts(checkpoint.vocab_size)[3]
    found, recorded = 0.0, pair[0]
    for start in range(12):
        rows = [Row(SessionId(str(n)), start, (n, n + 7), 1, [ids[start] + n]) for n in range(5)]
        one, other = (stage.logits(rows, range(5)) for stage in pair)
        found = max(found, difference(one, other))
    if recorded.model.asks_nothing and not recorded.recordings:
        print("nothing was recorded")
        return float("inf")
    return found


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    one, other = one.cpu(), other.cpu()
    return float((one - other).abs().max() / other.abs().max())


def stage_of(
    checkpoint: Checkpoint, device: str, quant: Quant, pages: int, *, recorded: bool
) -> Stage:
    model = load_slice(checkpoint, checkpoint.whole, None, quant, device)
    size = StageConfig(page_size=PAGE, pages=pages)
    return Stage(model, size, record=recording(device) if recorded else never)


def recording(device: str) -> Record | None:
    """None is the stage's own choice; without a GPU, what is recorded is called again."""
    return None if device.startswith("cuda") else lambda compute: compute


def never(_: Play) -> Play:
    raise RuntimeError(NOT_WANTED)


# ---- how fast?


def measure(device: str, folder: Path, end: float, *, quick: bool) -> None:
    config = SHAPE | SMALL if quick else SHAPE
    write_random_checkpoint(config, folder, dtype="bfloat16", shard="2GB")
    checkpoint = open_checkpoint(str(folder))
    print(f"\n{checkpoint.counts.parameters / 1e9:.2f} billion weights, context of {CONTEXT}\n")
    print("| weights | recorded | GB | " + " | ".join(f"decode {b}" for b in BATCHES), end="")
    print(f" tokens/s | prompt of {PROMPT} tokens/s | load s |\n|" + "---|" * 8)
    for quant, recorded in VARIANTS:
        if time.monotonic() > end:
            print(f"| {quant} | time is up |")
            continue
        print(measured(checkpoint, device, quant, recorded=recorded), flush=True)


def measured(checkpoint: Checkpoint, device: str, quant: Quant, *, recorded: bool) -> str:
    started = time.monotonic()
    each = -(-(CONTEXT + 2 * STEPS) // PAGE)
    stage = stage_of(checkpoint, device, quant, each * BATCHES[-1] + 70, recorded=recorded)
    loaded = time.monotonic() - started
    rates = [batch / decode_s(stage, batch, each) for batch in BATCHES]
    decodes = " | ".join(f"{rate:.0f}" for rate in rates)
    name = "bf16" if quant == "none" else quant
    prompt = PROMPT / prompt_s(stage)
    size = stage.model.nbytes / 1e9
    yes = f"{stage.recordings} shapes" if recorded else "no"
    return f"| {name} | {yes} | {size:.2f} | {decodes} | {prompt:.0f} | {loaded:.0f} |"


def decode_s(stage: Stage, batch: int, pages: int) -> float:
    """Of one step, the best half of them."""
    taken = []
    for step in range(STEPS):
        rows = [
            Row(
                SessionId(str(n)),
                CONTEXT + step,
                range(n * pages, (n + 1) * pages),
                1,
                [step + 3],
            )
            for n in range(batch)
        ]
        started = time.perf_counter()
        stage.logits(rows, range(batch)).argmax(-1).tolist()
        taken.append(time.perf_counter() - started)
    return sorted(taken)[STEPS // 4]


def prompt_s(stage: Stage) -> float:
    row = Row(SessionId("p"), 0, range(-(-PROMPT // PAGE)), PROMPT, [5] * PROMPT)
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        stage.logits([row], [0]).argmax(-1).tolist()
        taken.append(time.perf_counter() - started)
    return min(taken)


if __name__ == "__main__":
    sys.exit(main())
