import pytest
import torch

from shoal.exact import fp4
from shoal.exact.fp4 import as_fp4
from shoal.exact.linear import Linear
from shoal.exact.weights import FP4_TABLE, Int4Weight, quantise_int4


def mxfp4(rows: int, groups: int, octaves: int, seed: int = 0) -> torch.Tensor:
    """Random weights as such a checkpoint has them, exponents within so many octaves of a row."""
    chance = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, groups, 32), generator=chance)
    exponents = torch.randint(0, octaves, (rows, groups, 1), generator=chance)
    lowest = torch.randint(-20, 4, (rows, 1, 1), generator=chance)
    values = torch.tensor(FP4_TABLE).float()[codes] / 2
    return (values * torch.exp2((exponents + lowest).float())).view(rows, -1)


def value(weight: Int4Weight) -> torch.Tensor:
    whole = weight.expanded()
    return whole.codes.float() * whole.scale[:, None]


def test_weights_of_a_few_octaves_stay_as_they_are() -> None:
    weight = mxfp4(40, 6, 3)
    weight[3], weight[5, :32] = 0, 0
    kept = as_fp4(weight.bfloat16())
    assert kept is not None
    assert torch.equal(value(kept), weight)
    assert (value(quantise_int4(weight)) - weight).norm() > 0.05 * weight.norm()


def test_groups_far_below_their_rows_largest_are_rounded_to_half_a_percent_of_it() -> None:
    weight = mxfp4(40, 6, 9)
    kept = as_fp4(weight)
    assert kept is not None
    error = (value(kept) - weight).abs().amax(1) / weight.abs().amax(1)
    assert 0 < error.max() < 1 / 80


def test_a_width_that_is_no_whole_number_of_groups_is_kept_too() -> None:
    weight = mxfp4(5, 3, 2)[:, :70].contiguous()
    kept = as_fp4(weight)
    assert kept is not None
    assert torch.equal(value(kept), weight)


@pytest.mark.parametrize("at", [0, 30])
def test_other_weights_are_not_taken_for_them(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp4, "ROWS", 16)
    weight = mxfp4(40, 6, 3)
    weight[at, 7] = weight[at].abs().max() * 0.7
    assert as_fp4(weight) is None
    assert as_fp4(torch.randn(4, 64)) is None


def test_a_linear_of_them_computes_with_the_published_weights() -> None:
    weight, x = mxfp4(24, 4, 3), torch.randn(5, 128)
    kept = as_fp4(weight)
    assert kept is not None
    expected = x.double() @ weight.double().t()
    assert (Linear(kept)(x) - expected).norm() < 0.015 * expected.norm()  # x is rounded
