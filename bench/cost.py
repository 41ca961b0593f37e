"""How well the cost model foretells what a step takes, against the real engine.

Slices of several models are loaded with random weights, and steps of all kinds are timed: 1 to 32
sessions at short and long contexts, prompts of 16 to 256 tokens, both together. Two predictions are
compared with them: what is expected from the machine's measured rates and the slice's bytes alone
(`placement/cost.py`), and what the meter (`engine/pace.py`) makes of that once it has seen half of
the kinds of steps, asked for the other half. Errors are relative, over kinds of steps.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from contract import Bench, percentile
from live import write_model
from shapes import COMMON, SHAPES

from shoal.engine.pace import SpeedMeter, Work
from shoal.engine.rows import Row
from shoal.engine.stage import Stage, StageConfig
from shoal.hardware import Capability, detect
from shoal.hardware.measurement import measure_rates
from shoal.models.checkpoint import Checkpoint, open_checkpoint
from shoal.models.slice import load_slice
from shoal.node.choosing import shape_of
from shoal.pipeline import ServingConfig
from shoal.placement.cost import predict
from shoal.units import Quant, SessionId, Slice

PAGE = 16
LONGEST = 1024
MIXTURE = COMMON | {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 32000,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 512,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
}
CASES: list[tuple[str, dict[str, Any], Quant, str | None, tuple[int, int]]] = [
    ("SmolLM2-135M", SHAPES["SmolLM2-135M"], "int8", None, (0, 30)),
    ("SmolLM2-135M", SHAPES["SmolLM2-135M"], "int8", None, (8, 20)),
    ("SmolLM2-135M", SHAPES["SmolLM2-135M"], "int4", None, (0, 30)),
    (
        "TinyLlama-1.1B, 8 layers",
        SHAPES["TinyLlama-1.1B"] | {"num_hidden_layers": 8},
        "int8",
        None,
        (0, 8),
    ),
    (
        "TinyLlama-1.1B, 8 layers",
        SHAPES["TinyLlama-1.1B"] | {"num_hidden_layers": 8},
        "none",
        "bf16",
        (0, 8),
    ),
    ("32 experts, 6 layers", MIXTURE, "int8", None, (0, 6)),
]
QUICK = (0, 5)


def kinds(quick: bool) -> Iterator[tuple[int, int, int]]:
    """(sessions that generate, their context, prompt tokens)."""
    contexts = (64, 960) if quick else (64, 320, 960)
    for sessions in (1, 2, 4, 8, 16, 32):
        for context in contexts:
            yield sessions, context, 0
    for prompt in (16, 48, 128, 256):
        yield 0, 0, prompt
        yield 4, 320, prompt


class Bed:
    """A stage, and rows for it."""

    def __init__(
        self, checkpoint: Checkpoint, part: Slice, quant: Quant, dtype: str | None
    ) -> None:
        self.each = LONGEST // PAGE
        self.stage = Stage(
            load_slice(checkpoint, part, dtype, quant),
            StageConfig(page_size=PAGE, pages=33 * self.each),
        )

    def rows(self, sessions: int, context: int, prompt: int) -> list[Row]:
        rows = [self._row(n, context, 1) for n in range(sessions)]
        return rows + ([self._row(32, 0, prompt)] if prompt else [])

    def _row(self, place: int, start: int, count: int) -> Row:
        import torch

        model = self.stage.model
        pages = range(place * self.each, (place + 1) * self.each)
        ids = [(7 * at + place) % 1000 + 3 for at in range(start, start + count)]
        hidden = None
        if not model.first:
            hidden = torch.randn(count, model.hidden_size).to(model.dtype)
        session = SessionId(f"{place}")
        return Row(session, start, pages, count, ids if model.first else None, hidden)

    def step(self, rows: Sequence[Row]) -> None:
        if self.stage.model.last:
            self.stage.logits(rows, [n for n, row in enumerate(rows) if row.count == 1])
        else:
            self.stage.step(rows)


def timed(run: Callable[[], None], repeats: int) -> float:
    run()
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def measure(
    bench: Bench, capability: Capability, case: tuple[Any, ...], folder: Path
) -> list[float]:
    name, config, quant, dtype, (start, stop) = case
    model = folder / name.replace(" ", "_")
    if not model.exists():
        write_model(model, config)
    checkpoint, part = open_checkpoint(str(model)), Slice(start, stop)
    bed = Bed(checkpoint, part, quant, dtype)
    bed.step(bed.rows(32, 960, 0))  # every page has been written
    compute = quant if quant != "none" else dtype or checkpoint.dtype
    how = ServingConfig(memory_bytes=0, dtype=dtype, quant=quant)
    expected = predict(capability, shape_of(checkpoint, how), compute, part)
    meter = SpeedMeter(len(part), expected)
    seen: list[tuple[Work, float]] = []
    for kind in kinds(bench.quick):
        rows = bed.rows(*kind)
        counted = Work.of(rows)
        sampled = kind[0] if bed.stage.model.last else 0
        work = Work(counted.tokens, counted.context, sampled)
        seen.append((work, timed(lambda rows=rows: bed.step(rows), 3 if bench.quick else 9)))
    one_token = seen[0][1]
    random.Random(1).shuffle(seen)
    for work, seconds in seen[::2]:
        meter.observe(work, seconds)
    asked = seen[1::2]
    before, after = (
        [abs(speed.seconds(len(part), *work) / seconds - 1) for work, seconds in asked]
        for speed in (expected, meter.speed)
    )
    bench.row(
        what=f"{name} {part} {compute}",
        kinds=len(seen),
        one_token_ms=round(1e3 * one_token, 2),
        expected_p50=round(statistics.median(before), 3),
        expected_p90=round(percentile(before, 90), 3),
        corrected_p50=round(statistics.median(after), 3),
        corrected_p90=round(percentile(after, 90), 3),
    )
    return after


def main() -> None:
    bench = Bench("cost", __doc__)
    found = detect(gpus=False)
    capability = found.with_rates(measure_rates(found))
    errors: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(CASES):
            if not bench.quick or number in QUICK:
                errors += measure(bench, capability, case, Path(folder))
    middle = statistics.median(errors)
    bench.aim(
        "relative error of a step's time, corrected", "<= 0.15", got=middle, holds=middle <= 0.15
    )
    bench.finish()


if __name__ == "__main__":
    main()
