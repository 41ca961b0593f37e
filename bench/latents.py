"""Attention over latents without expanding them, against expanding them for every token.

Two layers of DeepSeek V3's architecture, 16 heads, latents of 512, float32; one token after a
context of different lengths, and the context read in chunks of 256. The peer is the same code with
the model's own expansion, which was how it ran before. Both take turns; times are medians.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from contract import Bench

from shoal.engine.rows import Row
from shoal.engine.stage import Stage, StageConfig
from shoal.models import parts
from shoal.models.checkpoint import Checkpoint, open_checkpoint
from shoal.models.random_checkpoint import write_random_checkpoint
from shoal.models.slice import load_slice
from shoal.units import Quant, SessionId

CONFIG = {
    "model_type": "deepseek_v3",
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 256,
    "max_position_embeddings": 4096,
    "q_lora_rank": 512,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
PAGES, CHUNK = 160, 256
SESSION = SessionId("bench")
WAYS: tuple[tuple[str, Quant, bool], ...] = (
    ("f32, expanded", "none", False),
    ("f32, absorbed", "none", True),
    ("int8, absorbed", "int8", True),
)


@contextmanager
def absorbing(wanted: bool) -> Iterator[None]:
    usual = parts.absorb
    if not wanted:
        parts.absorb = lambda part, *, exact: 0
    try:
        yield
    finally:
        parts.absorb = usual


def make(checkpoint: Checkpoint, quant: Quant, absorbed: bool) -> Stage:
    with absorbing(absorbed):
        model = load_slice(checkpoint, checkpoint.whole, "f32", quant)
    return Stage(model, StageConfig(page_size=16, pages=PAGES))


def row(start: int, count: int) -> Row:
    ids = [3 + at % 200 for at in range(start, start + count)]
    return Row(SESSION, start, range(PAGES), count, ids)


def read(stage: Stage, context: int) -> None:
    for start in range(0, context, CHUNK):
        stage.step([row(start, min(CHUNK, context - start))])


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def main() -> None:
    bench = Bench("latents", __doc__)
    torch.set_num_threads(1)
    repeats = 7 if bench.quick else 25
    decode: dict[tuple[str, int], float] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_random_checkpoint(CONFIG, Path(folder))
        checkpoint = open_checkpoint(folder)
        stages = {name: make(checkpoint, quant, absorbed) for name, quant, absorbed in WAYS}
    for context in (64, 512, 2048):
        prompt_s = {name: seconds(partial(read, stage, context)) for name, stage in stages.items()}
        times: dict[str, list[float]] = {name: [] for name in stages}
        for _ in range(repeats):
            for name, stage in stages.items():
                times[name].append(seconds(partial(stage.logits, [row(context, 1)], [0])))
        for name in stages:
            decode[name, context] = statistics.median(times[name])
            bench.row(
                what=f"{name}, context {context}",
                token_ms=decode[name, context] * 1e3,
                prompt_tokens_per_s=context / prompt_s[name],
            )
    for context, aim in ((512, 3.0), (2048, 10.0)):
        got = decode["f32, expanded", context] / decode["f32, absorbed", context]
        bench.aim(f"expanded / absorbed at {context}", f">= {aim}", got=got, holds=got >= aim)
    bench.finish()


if __name__ == "__main__":
    main()
