"""Our attention against the textbook, written out with loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.engine.attention import Scores, attend_row
from shoal.engine.plan import StepPlan
from shoal.engine.rows import Row
from shoal.units import SessionId


def textbook(q: Tensor, k: Tensor, v: Tensor, how: Scores) -> Tensor:
    count, heads, width = q.shape
    seen = k.shape[1]
    out = torch.zeros(count, heads, v.shape[2])
    for token in range(count):
        position = seen - count + token
        for head in range(heads):
            kv = head // (heads // k.shape[0])
            low = 0 if how.window is None else max(0, position - how.window + 1)
            scores = (k[kv, low : position + 1] @ q[token, head]) / math.sqrt(width)
            if how.softcap is not None:
                scores = how.softcap * torch.tanh(scores / how.softcap)
            weights = scores.exp()
            sink = how.sinks[head].exp() if how.sinks is not None else 0.0
            out[token, head] = (weights / (weights.sum() + sink)) @ v[kv, low : position + 1]
    return out


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(0, 9),
    st.sampled_from([(4, 4), (4, 2), (4, 1)]),
    st.sampled_from([None, 1, 3, 50]),
    st.sampled_from(["plain", "sinks", "softcap", "both"]),
    st.sampled_from([8, 4]),
)
def test_it_is_the_textbooks(
    count: int, before: int, heads: tuple[int, int], window: int | None, kind: str, v_width: int
) -> None:
    generator = torch.Generator().manual_seed(count * 100 + before)
    q = torch.randn(count, heads[0], 8, generator=generator)
    k = torch.randn(heads[1], before + count, 8, generator=generator)
    v = torch.randn(heads[1], before + count, v_width, generator=generator)
    sinks = torch.randn(heads[0], generator=generator) if kind in ("sinks", "both") else None
    softcap = 2.0 if kind in ("softcap", "both") else None
    how = Scores(window=window, sinks=sinks, softcap=softcap)
    plan = StepPlan.of([row(0, 1)], 4, torch.device("cpu"))
    mask = plan.mask(count, before + count, window) if before or window or count > 1 else None
    assert torch.allclose(
        attend_row(q, k[None], v[None], mask, how), textbook(q, k, v, how), atol=1e-5
    )


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_no_mask_means_causal(softcap: float | None) -> None:
    q, k = torch.randn(5, 2, 8), torch.randn(1, 2, 5, 8)
    how = Scores(softcap=softcap)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    assert torch.allclose(attend_row(q, k, k, None, how), attend_row(q, k, k, mask, how), atol=1e-6)


def row(start: int, count: int, pages: tuple[int, ...] = (0, 1, 2)) -> Row:
    return Row(SessionId("s"), start, pages, count)


def test_a_plan_puts_each_token_into_its_own_slot() -> None:
    rows = [row(3, 2, (2, 3)), row(5, 3, (7, 1))]
    plan = StepPlan.of(rows, 4, torch.device("cpu"))
    assert plan.positions.tolist() == [3, 4, 5, 6, 7]
    assert plan.slots.tolist() == [11, 12, 5, 6, 7]
    neighbours, scattered = plan.spans
    assert neighbours.base == 8
    assert neighbours.pages is None
    assert scattered.pages is not None
    assert scattered.pages.tolist() == [7, 1]


def test_a_mask_shows_the_past_within_the_window() -> None:
    plan = StepPlan.of([row(0, 1)], 4, torch.device("cpu"))
    assert plan.mask(2, 5, 3).int().tolist() == [[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert plan.mask(2, 5, 3) is plan.mask(2, 5, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 37])
@pytest.mark.parametrize(("kv_heads", "group"), [(1, 5), (3, 3), (8, 1), (4, 8)])
def test_the_bits_do_not_depend_on_the_number_of_threads(
    dtype: torch.dtype, count: int, kv_heads: int, group: int
) -> None:
    generator = torch.Generator().manual_seed(count)
    before = torch.get_num_threads()
    try:
        for context in (count, count + 50, count + 511):
            q = torch.randn(count, kv_heads * group, 64, generator=generator).to(dtype)
            k, v = torch.randn(2, 1, kv_heads, context, 64, generator=generator).to(dtype)
            mask = torch.ones(count, context, dtype=torch.bool).tril(context - count)
            results = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                results.append(attend_row(q, k, v, None if count == 1 else mask, Scores()))
            assert torch.equal(*results)
    finally:
        torch.set_num_threads(before)
