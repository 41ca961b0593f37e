from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.exact import native
from shoal.exact.attention import Scores
from shoal.exact.native_layer import NativeAttention, NativeStep, rms_norm
from shoal.exact.numbers import rms_norm as plain_rms_norm

from .paged import Pages, Plain, Span, pools

library = native.load()
pytestmark = pytest.mark.skipif(library is None, reason="no compiled library here")
VARIANTS = ("avx512vnni", "avxvnni", "avx2", "sse41", "neondot", "neon", "generic")


@dataclass(frozen=True)
class Shape:
    kv_heads: int
    group: int
    width: int
    value_width: int


shapes = st.builds(
    Shape,
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 7, 8]),
    width=st.sampled_from([1, 5, 32, 48, 64, 80, 128, 256]),
    value_width=st.sampled_from([1, 32, 40, 64, 128]),
)
# each row: new tokens of its first step, of its second, ...
histories = st.lists(
    st.tuples(st.sampled_from([1, 5, 31, 128, 129, 300]), st.sampled_from([1, 1, 4, 70])),
    min_size=1,
    max_size=3,
)


@pytest.fixture(params=VARIANTS)
def loaded(request: pytest.FixtureRequest) -> Iterator[native.Native]:
    assert library is not None
    before, threads = library.isa, library.threads
    if not library.set_isa(request.param):
        pytest.skip(f"{request.param} cannot run here")
    yield library
    library.set_isa(before)
    library.set_threads(threads)


@settings(max_examples=int(os.environ.get("SHOAL_EXAMPLES", "8")), deadline=None)
@given(
    shape=shapes,
    histories=histories,
    page_size=st.sampled_from([1, 7, 16, 64]),
    window=st.sampled_from([None, None, 1, 20, 128, 200]),
    softcap=st.sampled_from([None, 5.0]),
    with_sinks=st.booleans(),
    threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 1000),
)
@pytest.mark.usefixtures("loaded")
def test_paged_rows_attend_with_the_bits_of_each_row_alone(
    shape: Shape,
    histories: list[tuple[int, int]],
    page_size: int,
    window: int | None,
    softcap: float | None,
    with_sinks: bool,
    threads: int,
    seed: int,
) -> None:
    assert library is not None
    library.set_threads(threads)
    torch.manual_seed(seed)
    heads = shape.kv_heads * shape.group
    sinks = torch.randn(heads) if with_sinks else None
    how = Scores(shape.width**-0.5, window, sinks, softcap)
    pages = Pages(len(histories), max(map(sum, histories)) // page_size + 1, page_size, seed)
    cache = pools(pages.slots, shape.kv_heads, shape.width, shape.value_width)
    compiled, plain = NativeAttention(library, cache, how), Plain(len(histories))
    starts = [0] * len(histories)
    for counts in zip(*histories, strict=True):
        plain.spans = list(zip(starts, counts, strict=True))
        q = torch.randn(sum(counts), heads, shape.width) * 4
        k = torch.randn(sum(counts), shape.kv_heads, shape.width)
        v = torch.randn(sum(counts), shape.kv_heads, shape.value_width)
        assert torch.equal(compiled(pages.step(plain.spans), q, k, v), plain(q, k, v, how))
        starts = [start + count for start, count in zip(starts, counts, strict=True)]


def one_row(length: int, threads: int, heads: int = 2, window: int | None = None) -> torch.Tensor:
    """The last token's result after a context of `length`, cached in chunks of 400."""
    assert library is not None
    library.set_threads(threads)
    torch.manual_seed(1)
    pages = Pages(1, length // 16 + 1, 16)
    attention = NativeAttention(library, pools(pages.slots, 1, 64), Scores(0.125, window))
    for start in range(0, length, 400):
        count = min(400, length - start)
        q, k, v = (
            torch.randn(count, heads, 64),
            torch.randn(count, 1, 64),
            torch.randn(count, 1, 64),
        )
        out = attention(pages.step([(start, count)]), q, k, v)
    return out[-1]


@pytest.mark.usefixtures("loaded")
def test_a_long_context_shared_among_threads_has_the_bits_of_one_thread() -> None:
    assert torch.equal(one_row(1601, threads=2), one_row(1601, threads=1))
    assert torch.equal(one_row(1601, 2, window=700), one_row(1601, 1, window=700))


def small(window: int | None = None) -> tuple[NativeAttention, Pages]:
    assert library is not None
    pages = Pages(1, 4, 16)
    return NativeAttention(library, pools(pages.slots, 1, 32), Scores(0.2, window)), pages


def run(attention: NativeAttention, step: NativeStep) -> torch.Tensor:
    torch.manual_seed(0)
    shape = step.tokens, 1, 32
    return attention(step, torch.randn(shape), torch.randn(shape), torch.randn(shape))


def test_pages_that_no_window_reaches_may_be_gone() -> None:
    attention, pages = small(window=10)
    run(attention, pages.step([(0, 40)]))
    expected = run(attention, pages.step([(40, 1)]))
    pages.of_row[0][0] = -1
    assert torch.equal(run(attention, pages.step([(40, 1)])), expected)
    pages.of_row[0][1] = -1  # positions 16 .. 31, and 31 is the first that is seen
    with pytest.raises(ValueError, match="outside the pools"):
        run(attention, pages.step([(40, 1)]))


@pytest.mark.parametrize("page", [-1, 4, 1 << 40])
def test_a_page_outside_the_pools_is_refused(page: int) -> None:
    attention, pages = small()
    step_of: Span = (20, 3)
    step = pages.step([step_of])
    bad = NativeStep([20], [3], [[0, page]], 16, torch.tensor([1, 2, 3]))
    run(attention, step)
    with pytest.raises(ValueError, match="outside the pools"):
        run(attention, bad)


@pytest.mark.parametrize("slot", [-1, 64])
def test_a_slot_outside_the_pools_is_refused_before_anything_is_written(slot: int) -> None:
    attention, _ = small()
    before = attention.pools.keys.clone()
    with pytest.raises(ValueError, match="outside the pools"):
        run(attention, NativeStep([0], [2], [[0]], 16, torch.tensor([0, slot])))
    assert torch.equal(attention.pools.keys, before)


def test_a_row_whose_pages_do_not_reach_its_newest_token_is_refused() -> None:
    attention, _ = small()
    with pytest.raises(ValueError, match="outside the pools"):
        run(attention, NativeStep([16], [1], [[0]], 16, torch.tensor([0])))


def test_counts_that_do_not_add_up_are_refused() -> None:
    attention, _ = small()
    with pytest.raises(ValueError, match="do not fit"):
        run(attention, NativeStep([0], [3], [[0]], 16, torch.tensor([0, 1])))


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
def test_rows_are_normed_with_the_same_bits(loaded: native.Native, scale: float) -> None:
    torch.manual_seed(0)
    for width in (1, 33, 576, 4001):
        x, weight = torch.randn(3, width) * scale, torch.randn(width)
        x[1] = 0
        assert torch.equal(rms_norm(loaded, x, weight, 1e-6), plain_rms_norm(x, weight, 1e-6))
