"""The compiled linears against torch's own 8-bit path, and against what memory can deliver.

One layer of 2048 x 11264 (M rows in, quantised inside), as 8-bit and as 4-bit weights, with as many
threads as torch uses. More weights than the caches hold are used in turn, so one row reads memory.
All ways take turns in one process; times are the best of many. GB/s counts weight bytes only.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from itertools import cycle

import torch
from contract import Bench
from torch import Tensor

from shoal.exact import native
from shoal.exact.native import Native
from shoal.exact.product import product_for
from shoal.exact.weights import INT4_TABLE, quantise_rows

INPUTS, OUTPUTS = 2048, 11264
COPIES = 4  # 92 MB of 8-bit weights
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
WEIGHT_BYTES = {"8 bits": 1.0, "4 bits": 0.5 + 1 / 32, "torch": 1.0}

Way = Callable[[Tensor], Tensor]


def ways(kernels: Native) -> dict[str, Iterator[Way]]:
    """Each way's layers, one after the other, for ever."""
    made: dict[str, list[Way]] = {name: [] for name in WEIGHT_BYTES}
    table = torch.tensor(INT4_TABLE, dtype=torch.int8)
    for _ in range(COPIES):
        codes = torch.randint(-127, 128, (OUTPUTS, INPUTS), dtype=torch.int8)
        four = torch.randint(1, 16, (OUTPUTS, INPUTS), dtype=torch.uint8)
        multipliers = torch.randint(1, 19, (OUTPUTS, INPUTS // 32), dtype=torch.uint8)
        scale = torch.rand(OUTPUTS)
        made["8 bits"].append(kernels.linear8(codes, scale))
        made["4 bits"].append(kernels.linear4(four, table, multipliers, scale))
        made["torch"].append(by_torch(codes, scale))
    return {name: cycle(layers) for name, layers in made.items()}


def by_torch(codes: Tensor, scale: Tensor) -> Way:
    product = product_for(codes, scale)

    def multiply(x: Tensor) -> Tensor:
        rounded, row_scale = quantise_rows(x)
        return product(rounded).mul_(row_scale)

    return multiply


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def best_of(layers: dict[str, Iterator[Way]], rows: int, repeats: int) -> dict[str, float]:
    x = torch.randn(rows, INPUTS)
    best = dict.fromkeys(layers, float("inf"))
    for _ in range(repeats):
        for name, turn in layers.items():
            layer = next(turn)
            best[name] = min(best[name], seconds(lambda layer=layer: layer(x)))
    return best


def read_gb_per_s(repeats: int) -> float:
    """Bytes of a large tensor, summed by all threads."""
    memory = torch.zeros(1 << 25, dtype=torch.int64)
    return memory.nbytes / min(seconds(memory.sum) for _ in range(repeats)) / 1e9


def call_overhead_us(kernels: Native, repeats: int) -> float:
    """A call that computes next to nothing."""
    layer = kernels.linear8(torch.ones(1, 8, dtype=torch.int8), torch.ones(1))
    x = torch.randn(1, 8)
    return min(seconds(lambda: layer(x)) for _ in range(repeats)) * 1e6


def main() -> None:
    bench = Bench("kernels", __doc__)
    kernels = native.load()
    if kernels is None:
        bench.absent("compiled library", "no compiler here, or SHOAL_KERNELS=off")
        return bench.finish()
    kernels.set_threads(torch.get_num_threads())
    layers, repeats = ways(kernels), 15 if bench.quick else 60
    memory = read_gb_per_s(repeats)
    bench.row(what=f"read memory, {kernels.threads} threads", gb_per_s=memory)
    bench.row(what=f"one call, {kernels.isa}", us=call_overhead_us(kernels, 1000))
    results = {rows: best_of(layers, rows, max(6, repeats * 8 // (8 + rows))) for rows in ROWS}
    for rows, best in results.items():
        for name, took in best.items():
            gb = INPUTS * OUTPUTS * WEIGHT_BYTES[name] / took / 1e9
            gops = 2 * rows * INPUTS * OUTPUTS / took / 1e9
            bench.row(what=f"M={rows}, {name}", ms=took * 1e3, gb_per_s=gb, gops=gops)
    aims(bench, results, memory)
    bench.finish()


def aims(bench: Bench, results: dict[int, dict[str, float]], memory: float) -> None:
    one, many = results[1], results[256]
    for name in ("8 bits", "4 bits"):
        share = INPUTS * OUTPUTS * WEIGHT_BYTES[name] / one[name] / 1e9 / memory
        bench.aim(f"M=1, {name}: share of a plain read", ">= 0.8", got=share, holds=share >= 0.8)
    ratio = many["4 bits"] / many["8 bits"]
    bench.aim("M=256: time of 4 bits over 8 bits", "<= 1.05", got=ratio, holds=ratio <= 1.05)
    for rows in (1, 32, 256):
        ratio = results[rows]["torch"] / results[rows]["8 bits"]
        bench.aim(f"M={rows}: torch's time over ours", ">= 1", got=ratio, holds=ratio >= 1)


if __name__ == "__main__":
    sys.exit(main())
