import pytest
import torch
from torch import nn

from shoal.errors import UnsupportedModel
from shoal.models import weight_only
from shoal.models.checkpoint import BUILTIN, open_checkpoint
from shoal.models.sizes import model_sizes
from shoal.models.slice import load_slice
from shoal.models.weight_only import (
    WeightOnly4,
    WeightOnly8,
    WeightOnlyParts,
    has_packed_4,
    has_packed_8,
    round_linears,
    rounded_4_bits,
)
from shoal.units import Quant


def linear(inputs: int, outputs: int, dtype: torch.dtype, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias).to(dtype)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.fixture(params=["torch's products", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr(weight_only, "has_packed_8", lambda *_: False)
        monkeypatch.setattr(weight_only, "has_packed_4", lambda *_: False)
    return str(request.param)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_it_computes_nearly_what_the_linear_layer_computes(
    dtype: torch.dtype, rows: int, bias: bool
) -> None:
    plain = linear(128, 64, dtype, bias=bias)
    x = torch.randn(2, rows, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = plain(x)
    for module, allowed in ((WeightOnly8(plain), 0.012), (WeightOnly4(plain), 0.09)):
        found = module(x)
        assert found.dtype == dtype
        assert found.shape == expected.shape
        assert error(found, expected) < allowed


@torch.no_grad()
def test_torchs_products_and_the_plain_ones_are_of_the_same_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not (has_packed_8("cpu", torch.bfloat16) and has_packed_4("cpu")):
        pytest.skip("torch has no products with packed weights on this machine")
    layer = linear(96, 64, torch.bfloat16)
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    packed = [WeightOnly8(layer)(x), WeightOnly4(layer)(x)]
    monkeypatch.setattr(weight_only, "has_packed_8", lambda *_: False)
    monkeypatch.setattr(weight_only, "has_packed_4", lambda *_: False)
    for one, other in zip(packed, [WeightOnly8(layer)(x), WeightOnly4(layer)(x)], strict=True):
        assert error(one, other) < 0.01


def test_the_steps_of_4_bits_reach_the_ends_of_each_group() -> None:
    weight = torch.linspace(-3, 5, 64).view(2, 32)
    codes, step, middle = rounded_4_bits(weight)
    found = (codes.float() - 8) * step + middle
    assert (found - weight).abs().max() <= step.max() / 2 + 1e-6
    assert codes.min() == 0
    assert codes.max() == 15


def test_equal_weights_divide_nothing_by_zero() -> None:
    plain = linear(32, 64, torch.float32, bias=False)
    with torch.no_grad():
        plain.weight.fill_(0.0)
        for module in (WeightOnly8(plain), WeightOnly4(plain)):
            assert torch.equal(module(torch.ones(1, 32)), torch.zeros(1, 64))


def test_layers_whose_inputs_are_no_whole_groups_get_8_bits() -> None:
    model = nn.Sequential(linear(64, 64, torch.float32), linear(40, 8, torch.float32))
    round_linears(model, "w4")
    assert [type(layer) for layer in model] == [WeightOnly4, WeightOnly8]
    assert model[1].weight.shape == (8, 40)  # type: ignore[union-attr]


def test_experts_that_lie_together_are_refused() -> None:
    part = nn.Module()
    part.gate_up_proj = nn.Parameter(torch.zeros(2, 3, 4))
    with pytest.raises(UnsupportedModel, match="gate_up_proj") as caught:
        WeightOnlyParts("w8")(part, 0)
    assert "int8" in caught.value.hint


@pytest.mark.parametrize("quant", ["w8", "w4"])
def test_a_slice_takes_what_was_foretold(quant: Quant) -> None:
    checkpoint = open_checkpoint(BUILTIN)
    model = load_slice(checkpoint, checkpoint.whole, None, quant)
    sizes = model_sizes(checkpoint, quant)
    assert sizes.whole * 0.99 <= model.nbytes <= sizes.whole * 1.02
    assert not model.exact
    assert model.compute == quant
