"""Measures how fast the first device reads memory and multiplies matrices.

Best of short repeats: what else runs on the machine can only make a repeat slower. torch's thread
count, default type and random state stay as they are. Without torch nothing is measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

from .capability import Capability, Device, Rates
from .probe import attempt, find_torch

Work = Callable[[], object]

SMALLEST_MATRIX, LARGEST_MATRIX = 256, 4096
LARGEST_GPU_MATRIX = 8192
BUFFER_BYTES, GPU_BUFFER_BYTES = 256 << 20, 1 << 30  # more than caches hold


def measure_rates(found: Capability, budget_s: float = 1.5) -> Rates:
    """Measure `devices[0]` for about `budget_s`, not counting the import of torch.

    Four probes share the time evenly; one that the device cannot do leaves 0.0.
    """
    torch = find_torch()
    if torch is None or not found.devices:
        return Rates()
    bench = _Bench(torch, found.devices[0], budget_s / 4)
    room = found.free_memory_bytes if bench.device.kind == "cpu" else bench.device.memory_bytes
    with torch.inference_mode():
        rates = Rates(
            memory_bytes_per_s=attempt(lambda: bench.reading(room), 0.0),
            f32_flops=attempt(lambda: bench.multiplying(bench.float_product("float32")), 0.0),
            bf16_flops=attempt(lambda: bench.multiplying(bench.float_product("bfloat16")), 0.0),
            int8_ops=attempt(lambda: bench.multiplying(bench.integer_product), 0.0),
        )
    attempt(bench.release, None)
    return rates


class _Bench:
    """Times work on one device, `seconds` for each probe."""

    def __init__(self, torch: ModuleType, device: Device, seconds: float) -> None:
        self.torch, self.device, self.seconds = torch, device, seconds

    def reading(self, room_bytes: int) -> float:
        """Bytes per second of summing an array; an eighth of the room at most."""
        wanted = BUFFER_BYTES if self.device.kind == "cpu" else GPU_BUFFER_BYTES
        size = min(wanted, room_bytes // 8 or wanted // 4)
        end = time.perf_counter() + self.seconds
        numbers = self.torch.ones(size // 4, device=self.device.kind)  # written: real pages
        best = self._seconds(numbers.sum)
        while time.perf_counter() < end:
            best = min(best, self._seconds(numbers.sum))
        return size / best

    def multiplying(self, product: Callable[[int], Work]) -> float:
        """Operations per second of square products, which grow as far as the time allows."""
        largest = LARGEST_MATRIX if self.device.kind == "cpu" else LARGEST_GPU_MATRIX
        end = time.perf_counter() + self.seconds
        size, rate = SMALLEST_MATRIX, 0.0
        work = product(size)
        self._seconds(work)  # the first call prepares kernels
        while True:
            taken = self._seconds(work)
            rate = max(rate, 2 * size**3 / taken)
            left = end - time.perf_counter()
            if left <= 0:
                return rate
            if size < largest and 16 * taken < left:  # twice the size takes eight times as long
                size *= 2
                work = product(size)

    def float_product(self, dtype: str) -> Callable[[int], Work]:
        def product(size: int) -> Work:
            matrix = self._ones(size, getattr(self.torch, dtype))
            return lambda: matrix @ matrix

        return product

    def integer_product(self, size: int) -> Work:
        matrix = self._ones(size, self.torch.int8)
        return lambda: self.torch._int_mm(matrix, matrix.t())

    def _ones(self, size: int, dtype: Any) -> Any:
        return self.torch.ones(size, size, dtype=dtype, device=self.device.kind)

    def _seconds(self, work: Work) -> float:
        self._wait()
        started = time.perf_counter()
        work()
        self._wait()
        return max(time.perf_counter() - started, 1e-9)

    def release(self) -> None:
        """Give the memory of a GPU back to others."""
        if self.device.kind != "cpu":
            getattr(self.torch, self.device.kind).empty_cache()

    def _wait(self) -> None:
        """GPUs work on after the call has returned."""
        if self.device.kind != "cpu":
            getattr(self.torch, self.device.kind).synchronize()
