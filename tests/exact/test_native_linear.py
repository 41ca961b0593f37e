"""The compiled linears against 64-bit integers: every variant, any shape, any number of threads."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.exact import build, native
from shoal.exact.native import Native, NativeExperts
from shoal.exact.product import product_for
from shoal.exact.weights import FP4_TABLE, INT4_TABLE, Int4Weight, quantise_int4, quantise_rows

VARIANTS = list(build.variants(platform.machine()))
SHAPES = st.tuples(st.integers(1, 70), st.integers(1, 700), st.integers(1, 140))
few = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(params=VARIANTS)
def kernels(request: pytest.FixtureRequest) -> Iterator[Native]:
    found = native.load()
    if found is None:
        pytest.skip("no compiler here")
    before, threads = found.isa, found.threads
    if not found.set_isa(request.param):
        pytest.skip("not on this processor")
    found.set_threads(2)
    yield found
    found.set_isa(before)
    found.set_threads(threads)


def by_integers(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    rows, row_scale = quantise_rows(x)
    sums = (rows.long() - 128) @ codes.long().t()
    y = sums.float().mul_(scale).mul_(row_scale)
    return y if bias is None else y + bias


def some_weights(outputs: int, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    codes = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    return codes, torch.rand(outputs) + 0.01, torch.randn(outputs)


@few
@given(shape=SHAPES, seed=st.integers(0, 99))
def test_eight_bits_equal_the_integer_sum(
    kernels: Native, shape: tuple[int, int, int], seed: int
) -> None:
    torch.manual_seed(seed)
    rows, inputs, outputs = shape
    x = torch.randn(rows, inputs) * torch.rand(rows, 1) * 50
    codes, scale, bias = some_weights(outputs, inputs)
    assert torch.equal(kernels.linear8(codes, scale)(x), by_integers(x, codes, scale))
    assert torch.equal(kernels.linear8(codes, scale, bias)(x), by_integers(x, codes, scale, bias))


@few
@given(shape=SHAPES, seed=st.integers(0, 99), table=st.sampled_from([INT4_TABLE, FP4_TABLE]))
def test_four_bits_equal_the_expanded_weights(
    kernels: Native, shape: tuple[int, int, int], seed: int, table: tuple[int, ...]
) -> None:
    torch.manual_seed(seed)
    rows, inputs, outputs = shape
    x, most = torch.randn(rows, inputs), 127 // max(map(abs, table))
    codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8)
    multipliers = torch.randint(1, most + 1, (outputs, -(-inputs // 32)), dtype=torch.uint8)
    weight = Int4Weight(codes, multipliers, torch.rand(outputs), table)
    whole, bias = weight.expanded(), torch.randn(outputs)
    y = kernels.linear4(
        codes, torch.tensor(table, dtype=torch.int8), multipliers, whole.scale, bias
    )
    assert torch.equal(y(x), by_integers(x, whole.codes, whole.scale, bias))


@few
@given(shape=SHAPES, seed=st.integers(0, 99))
def test_twelve_bits_equal_the_integer_sum(
    kernels: Native, shape: tuple[int, int, int], seed: int
) -> None:
    torch.manual_seed(seed)
    rows, inputs, outputs = shape
    x, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    x_scale, w_scale = (t.abs().amax(1).clamp_(min=1e-12).div_(2047) for t in (x, weight))
    x_codes, w_codes = (x / x_scale[:, None]).round(), (weight / w_scale[:, None]).round()
    sums = x_codes.long() @ w_codes.long().t()
    expected = sums.float().mul_(w_scale).mul_(x_scale[:, None]).add_(bias)
    assert torch.equal(kernels.linear16(weight, bias)(x), expected)


@pytest.mark.parametrize("inputs", [256, 8192])
def test_the_largest_codes_and_weights_neither_saturate_nor_wrap(
    kernels: Native, inputs: int
) -> None:
    x, codes = torch.ones(3, inputs), torch.full((33, inputs), 127, dtype=torch.int8)
    x[1] = -1
    codes[::2] = -127
    scale = torch.ones(33)
    expected = by_integers(x, codes, scale)
    assert expected[0, 1] == pytest.approx(127 * inputs)
    assert torch.equal(kernels.linear8(codes, scale)(x), expected)
    four = (torch.full((33, inputs), 15, dtype=torch.uint8), torch.full((16,), 7, dtype=torch.int8))
    multipliers = torch.full((33, inputs // 32), 18, dtype=torch.uint8)
    expected = by_integers(x, torch.full((33, inputs), 126, dtype=torch.int8), scale)
    assert torch.equal(kernels.linear4(*four, multipliers, scale)(x), expected)
    assert torch.equal(kernels.linear16(torch.ones(2, inputs))(x)[:, 0] > 0, x[:, 0] > 0)


@pytest.mark.parametrize("kind", [8, 4, 16])
def test_a_row_that_is_not_finite_is_nan_and_harms_no_other(kernels: Native, kind: int) -> None:
    weight = torch.randn(40, 100)
    int4 = quantise_int4(weight)
    table = torch.tensor(INT4_TABLE, dtype=torch.int8)
    linear = {
        8: kernels.linear8(int4.expanded().codes, int4.scale),
        4: kernels.linear4(int4.codes, table, int4.multipliers, int4.scale),
        16: kernels.linear16(weight),
    }[kind]
    x = torch.randn(30, 100)
    x[4] = 0
    before = linear(x)
    x[2, 3], x[7, 99], x[29, 0] = torch.nan, torch.inf, -torch.inf
    after = linear(x)
    bad = torch.tensor([2, 7, 29])
    assert after[bad].isnan().all()
    after[bad] = before[bad]
    assert torch.equal(after, before)
    assert not before[4].any()


@pytest.mark.parametrize("rows", [1, 5, 13, 40, 300])
def test_neither_threads_nor_neighbours_change_a_row(kernels: Native, rows: int) -> None:
    x, (codes, scale, bias) = torch.randn(rows, 577), some_weights(131, 577)
    linear = kernels.linear8(codes, scale, bias)
    together = linear(x)
    kernels.set_threads(1)
    assert torch.equal(linear(x), together)
    assert torch.equal(linear(x[-1:].contiguous()), together[-1:])


@pytest.mark.parametrize("rows", [1, 33])
def test_torch_and_the_library_give_the_same_bits(kernels: Native, rows: int) -> None:
    x, (codes, scale, _) = torch.randn(rows, 577), some_weights(131, 577)
    quantised, row_scale = quantise_rows(x)
    by_torch = product_for(codes, scale)(quantised).mul_(row_scale)
    assert torch.equal(kernels.linear8(codes, scale)(x), by_torch)
    ours, our_scale = kernels.quantise(x)
    assert torch.equal(ours, quantised)
    assert torch.equal(our_scale, row_scale)


def test_each_expert_computes_its_own_rows(kernels: Native) -> None:
    weights = [some_weights(70, 96) for _ in range(5)]
    experts = NativeExperts([kernels.linear8(*weight) for weight in weights])
    x, begins = torch.randn(300, 96), [0, 0, 1, 260, 260, 300]
    y = experts(x, begins)
    for expert, weight in enumerate(weights):
        rows = slice(begins[expert], begins[expert + 1])
        assert torch.equal(y[rows], by_integers(x[rows], *weight))


def test_no_rows_give_no_rows(kernels: Native) -> None:
    assert kernels.linear8(*some_weights(3, 5))(torch.empty(0, 5)).shape == (0, 3)


def test_weights_out_of_range_are_refused(kernels: Native) -> None:
    codes, multipliers = torch.full((2, 32), 15, dtype=torch.uint8), torch.ones(2, 1).byte()
    table, scale = torch.tensor(FP4_TABLE, dtype=torch.int8), torch.ones(2)
    for wrong in (multipliers * 11, multipliers * 0):  # 11 * 12 is over 127
        with pytest.raises(ValueError, match="out of range"):
            kernels.linear4(codes, table, wrong, scale)
    with pytest.raises(ValueError, match="out of range"):
        kernels.linear8(torch.zeros(1, native.LARGEST_K + 1, dtype=torch.int8), torch.ones(1))


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(2, 6), torch.zeros(2, 5).double(), torch.zeros(5, 2).t()],
    ids=["width", "dtype", "strides"],
)
def test_tensors_that_would_be_misread_are_refused(kernels: Native, wrong: Tensor) -> None:
    linear = kernels.linear8(*some_weights(3, 5))
    with pytest.raises(ValueError, match="wanted"):
        linear(wrong)
