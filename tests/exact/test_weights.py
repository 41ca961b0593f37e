"""Weights rounded to 8 and to 4 bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.exact import native
from shoal.exact.weights import (
    FP4_TABLE,
    INT4_TABLE,
    Int4Weight,
    _int4_block,
    quantise_int4,
    quantise_int8,
)


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def floats(weight: Int4Weight) -> torch.Tensor:
    whole = weight.expanded()
    return whole.codes.float() * whole.scale[:, None]


def error(weight: torch.Tensor, rounded: torch.Tensor) -> float:
    return float((weight - rounded).norm() / weight.norm())


def test_four_bits_in_groups_are_nearly_as_good_as_free_scales_for_each_group() -> None:
    weight = gaussian(64, 1024)
    groups = weight.view(64, -1, 32)
    step = groups.abs().amax(2, keepdim=True) / 7
    free = ((groups / step).round() * step).view_as(weight)
    assert error(weight, floats(quantise_int4(weight))) < 1.05 * error(weight, free)


def test_expanded_weights_are_the_table_times_the_multiplier_and_fit_eight_bits() -> None:
    for table in (INT4_TABLE, FP4_TABLE):
        codes = torch.randint(0, 16, (3, 70), dtype=torch.uint8)
        multipliers = torch.randint(1, 11, (3, 3), dtype=torch.uint8)
        whole = Int4Weight(codes, multipliers, torch.ones(3), table).expanded()
        for n, k in ((0, 0), (1, 31), (2, 32), (2, 69)):
            assert int(whole.codes[n, k]) == table[codes[n, k]] * int(multipliers[n, k // 32])
    assert quantise_int4(gaussian(9, 100)).expanded().codes.abs().amax() <= 127


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(1, 130), st.integers(0, 99), st.sampled_from([1.0, 30.0]))
def test_the_compiled_library_rounds_to_the_very_same_codes(
    rows: int, columns: int, seed: int, outlier: float
) -> None:
    library = native.load()
    if library is None:
        pytest.skip("no compiled library: there is no C++ compiler here")
    weight = gaussian(rows, columns, seed)
    weight[0, columns // 2] *= outlier
    weight[-1, : columns // 3] = 0
    for ours, theirs in zip(library.round4(weight), _int4_block(weight), strict=True):
        assert torch.equal(ours, theirs)


def test_a_row_of_zeros_stays_zero() -> None:
    assert not floats(quantise_int4(torch.zeros(2, 40))).any()
    assert not quantise_int8(torch.zeros(2, 40)).codes.any()
