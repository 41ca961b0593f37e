"""Whole decoder layers in the compiled library: rows of one token after 128 others, and a prompt.

Random weights, all layers of a shape in one call, as they run in a stage. Times are the best of
many; GB/s counts weight bytes only, so for one row it is to be held against what memory delivers.
"""

# T new tokens, all rows together

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from contract import Bench
from shapes import SHAPES
from torch import Tensor

from shoal.exact import native
from shoal.exact.attention import Scores
from shoal.exact.layer import Angles, AttentionPart, DenseLayer, FeedForward
from shoal.exact.linear import Linear
from shoal.exact.native import Native
from shoal.exact.native_layer import NativeLayers, NativeStep, Pools
from shoal.exact.weights import Weight, quantise_int4, quantise_int8

PAGE, CONTEXT, PROMPT = 16, 128, 256
BATCHES = (1, 8, 32)
QUANT: dict[str, Callable[[Tensor], Weight]] = {"int8": quantise_int8, "int4": quantise_int4}


@dataclass(frozen=True)
class Shape:
    layers: int
    hidden: int
    wide: int
    heads: int
    kv_heads: int

    @property
    def width(self) -> int:
        return self.hidden // self.heads


def shape_of(name: str) -> Shape:
    config: dict[str, Any] = SHAPES[name]
    keys = "num_hidden_layers", "hidden_size", "intermediate_size"
    return Shape(*(config[k] for k in (*keys, "num_attention_heads", "num_key_value_heads")))


def make_layer(shape: Shape, quant: str) -> DenseLayer:
    def linear(inputs: int, outputs: int) -> Linear:
        return Linear(QUANT[quant](torch.randn(outputs, inputs) / inputs**0.5))

    norm, joined = torch.ones(shape.hidden), (shape.heads + 2 * shape.kv_heads) * shape.width
    attention = AttentionPart(
        norm=norm,
        qkv=linear(shape.hidden, joined),
        out=linear(shape.heads * shape.width, shape.hidden),
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        width=shape.width,
        scores=Scores(shape.width**-0.5),
    )
    gate_up, down = linear(shape.hidden, 2 * shape.wide), linear(shape.wide, shape.hidden)
    return DenseLayer(attention, FeedForward(norm, gate_up, down, "silu"))


def nbytes(layer: DenseLayer) -> int:
    attention, mlp = layer.attention, layer.feed_forward
    return sum(x.nbytes for x in (attention.qkv, attention.out, mlp.gate_up, mlp.down))


def make_step(rows: int, count: int, context: int, half: int) -> tuple[NativeStep, int]:
    """Each row has `count` new tokens after `context` others; and how many slots there are."""
    of_row = (context + count) // PAGE + 1
    pages = [[page * rows + row for page in range(of_row)] for row in range(rows)]
    positions = range(context, context + count)
    slots = [pages[row][p // PAGE] * PAGE + p % PAGE for row in range(rows) for p in positions]
    turns = torch.rand(rows * count, half)
    angles = [Angles(turns.cos(), turns.sin())]
    into = torch.tensor(slots)
    step = NativeStep([context] * rows, [count] * rows, pages, PAGE, into, angles)
    return step, rows * of_row * PAGE


def make_pools(slots: int, shape: Shape) -> Pools:
    size = slots, shape.kv_heads, shape.width
    keys, values = (torch.randint(-2047, 2048, size, dtype=torch.int16) for _ in range(2))
    return Pools(keys, torch.full(size[:2], 1e-3), values, torch.full(size[:2], 1e-3))


def best_seconds(run: Callable[[], object], repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begin)
    return best


def measure(bench: Bench, library: Native, name: str, quant: str) -> None:
    shape = shape_of(name)
    layers = [make_layer(shape, quant) for _ in range(shape.layers)]
    weights = sum(map(nbytes, layers))
    for rows, count, context in (*((b, 1, CONTEXT) for b in BATCHES), (1, PROMPT, 0)):
        step, slots = make_step(rows, count, context, shape.width // 2)
        compiled = NativeLayers(library, [(layer, make_pools(slots, shape)) for layer in layers])
        x = torch.randn(step.tokens, shape.hidden)
        what = f"{name}, {quant}, " + (f"batch {rows}" if count == 1 else f"prompt of {count}")
        for threads in (1, 2):
            library.set_threads(threads)
            repeats = max(3, (20 if bench.quick else 100) // step.tokens)
            run = lambda: compiled.run(step, x, torch.bfloat16)  # noqa: B023, E731 - run at once
            took = best_seconds(run, repeats)
            bench.row(
                what=f"{what}, {threads} threads",
                ms=took * 1e3,
                tokens_per_s=step.tokens / took,
                gb_per_s=weights / took / 1e9,
            )


def main() -> None:
    bench = Bench("layers", __doc__)
    library = native.load()
    if library is None:
        bench.absent("compiled library", "no compiler here, or SHOAL_KERNELS=off")
        return bench.finish()
    for name in SHAPES:
        for quant in QUANT:
            measure(bench, library, name, quant)
    bench.finish()


if __name__ == "__main__":
    main()
