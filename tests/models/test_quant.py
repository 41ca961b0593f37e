import os
import platform
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shoal.exact import native, product
from shoal.exact.product import (
    AnyDevice,
    OneCall,
    Product,
    TwoCalls,
    by_float64,
    by_int_mm,
    is_exact,
)
from shoal.exact.weights import quantise_int8, quantise_rows
from shoal.models.quant import ExactLinear, quantise, quantise_linears

SHAPES = [(576, 192), (577, 131), (2049, 64), (1, 1), (3, 5), (4200, 17)]
PLACES = [(0, 1), (0, 8), (0, 33), (20, 21), (3, 11), (5, 38)]


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(inputs: int, outputs: int, *, bias: bool = True, seed: int = 1) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        layer.weight.copy_(noise(outputs, inputs, seed=seed))
        if bias:
            layer.bias.copy_(noise(outputs, seed=seed + 1))
    return layer


def exact(layer: nn.Linear) -> ExactLinear:
    return ExactLinear(layer, quantise("int8"))


def parts(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rounded = quantise_int8(weight)
    return rounded.codes, rounded.scale


def from_integers(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """The documented formula, with 64-bit integers."""
    codes, scale = quantise_rows(x.float())
    weights, weight_scale = parts(layer.weight.detach())
    total = (codes.long() - 128) @ weights.long().t()
    result = total.float() * weight_scale * scale
    return result if layer.bias is None else result + layer.bias.detach()


def skip_unless_exact(way: type[Product]) -> None:
    """Any x86 processor must be able to do it in two calls, most in one."""
    required = way is TwoCalls and platform.machine() in ("x86_64", "AMD64")
    if way is not AnyDevice and not required and not is_exact(way):
        pytest.skip("this processor cannot do it exactly, and the self-test knows")


def test_rows_and_weights_are_rounded_to_the_nearest_code() -> None:
    x = noise(20, 300)
    codes, scale = quantise_rows(x)
    assert ((codes.double() - 128) - x.double() / scale).abs().max() < 0.5001
    assert (codes.min(), codes.max()) == (1, 255)
    weights, weight_scale = parts(x)
    assert (weights.double() - x.double() / weight_scale[:, None]).abs().max() < 0.5001
    assert (weights.abs().amax(1) == 127).all()


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.usefixtures("threads")
def test_a_row_has_the_bits_of_the_integer_formula_at_any_place_in_any_batch(
    inputs: int, outputs: int
) -> None:
    layer, x = linear(inputs, outputs), noise(40, inputs)
    quantised = exact(layer)
    whole = quantised(x)
    assert torch.equal(whole, from_integers(layer, x))
    for start, stop in PLACES:
        assert torch.equal(quantised(x[start:stop]), whole[start:stop])


@pytest.mark.parametrize("way", [OneCall, TwoCalls, AnyDevice])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_every_way_of_multiplying_gives_the_same_bits(
    way: type[Product], inputs: int, outputs: int
) -> None:
    skip_unless_exact(way)
    codes, _ = quantise_rows(noise(9, inputs) * 4)
    weights, scale = parts(noise(outputs, inputs, seed=3))
    expected = ((codes.long() - 128) @ weights.long().t()).float() * scale
    assert torch.equal(way(weights, scale)(codes), expected)  # type: ignore[call-arg]


@pytest.mark.parametrize("way", [OneCall, TwoCalls, AnyDevice])
def test_sums_too_large_for_float32_are_rounded_once_at_the_end(way: type[Product]) -> None:
    skip_unless_exact(way)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(200, 256, (4, 9001), generator=generator).to(torch.uint8)
    weights = torch.randint(90, 128, (64, 9001), generator=generator).to(torch.int8)
    expected = ((codes.long() - 128) @ weights.long().t()).float()
    assert torch.equal(way(weights, torch.ones(64))(codes), expected)  # type: ignore[call-arg]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 40), st.integers(1, 300), st.integers(0, 999))
def test_the_bits_are_those_of_integers_for_any_shape(
    rows: int, outputs: int, inputs: int, seed: int
) -> None:
    layer, x = linear(inputs, outputs, bias=bool(seed % 2), seed=seed), noise(rows, inputs)
    assert torch.equal(exact(layer)(x), from_integers(layer, x))


@pytest.mark.parametrize("rows", [1, 16, 17, 40])
def test_the_integer_product_of_cuda_is_called_so_that_it_is_exact(rows: int) -> None:
    codes, _ = quantise_rows(noise(rows, 64))
    weights, _ = parts(noise(24, 64, seed=3))
    if not is_exact(OneCall):
        codes = codes.clamp(96, 160)  # small enough not to saturate
    assert torch.equal(by_int_mm(codes, weights).double(), by_float64(codes, weights))


PRINT_BITS = """
import sys, torch
from shoal.models.quant import ExactLinear, quantise
generator = torch.Generator().manual_seed(0)
layer = torch.nn.Linear(577, 131, bias=False)
layer.weight.data = torch.randn(131, 577, generator=generator)
found = ExactLinear(layer, quantise("int8"))(torch.randn(9, 577, generator=generator))
print(found.numpy().tobytes().hex())
"""


def test_a_processor_that_saturates_gives_the_same_bits(capsys: pytest.CaptureFixture[str]) -> None:
    saturating = subprocess.run(
        [sys.executable, "-c", PRINT_BITS],
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "SHOAL_KERNELS": "off"},
        capture_output=True,
        text=True,
        check=True,
    )
    exec(PRINT_BITS, {})  # noqa: S102 (the same program, on the processor as it is)
    assert saturating.stdout == capsys.readouterr().out != ""


def test_without_the_kernel_the_bits_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda: None)
    layer, x = linear(96, 48), noise(5, 96)
    expected = exact(layer)(x)

    def missing(*_: object) -> torch.Tensor:
        raise AttributeError("'_OpNamespace' 'onednn' object has no attribute 'qlinear_prepack'")

    monkeypatch.setattr(product, "_packed", missing)
    is_exact.cache_clear()
    try:
        fallback = exact(layer)
        assert isinstance(fallback.exact.product, AnyDevice)
        assert not is_exact(OneCall)
        assert torch.equal(fallback(x), expected)
    finally:
        is_exact.cache_clear()


def test_a_kernel_that_saturates_is_found_out() -> None:
    class Saturating(OneCall):
        def __call__(self, codes: torch.Tensor) -> torch.Tensor:
            return super().__call__(codes).clamp(-(2.0**20), 2.0**20)

    assert not is_exact(Saturating)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_output_has_the_dtype_and_the_leading_shape_of_the_input(dtype: torch.dtype) -> None:
    layer = linear(64, 24).to(dtype)
    quantised, x = exact(layer), noise(2, 3, 64).to(dtype)
    assert quantised(x).dtype == dtype
    assert quantised(x).shape == (2, 3, 24)
    assert quantised(x[0, 0]).shape == (24,)
    assert quantised(x[:0]).shape == (0, 3, 24)
    assert torch.equal(quantised(x)[1, 2], quantised(x[1, 2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_against_float_is_under_two_percent(dtype: torch.dtype) -> None:
    layer, x = linear(1024, 256, bias=False).to(dtype), noise(32, 1024).to(dtype)
    expected = x.double() @ layer.weight.detach().double().t()
    assert (exact(layer)(x).double() - expected).norm() < 0.02 * expected.norm()


def test_an_outlier_or_nan_in_one_row_leaves_the_others_as_they_were() -> None:
    quantised, x = exact(linear(256, 64)), noise(4, 256)
    before = quantised(x)
    x[1, 7], x[2, 9] = 1e6, torch.nan
    after = quantised(x)
    assert torch.equal(after[[0, 3]], before[[0, 3]])
    assert not after[2].isfinite().any()


def test_rows_and_weights_of_zeros_give_the_bias() -> None:
    layer = linear(16, 4)
    assert torch.equal(exact(layer)(torch.zeros(2, 16)), layer.bias.detach().expand(2, 4))
    nn.init.zeros_(layer.weight)
    assert torch.equal(exact(layer)(noise(2, 16)), layer.bias.detach().expand(2, 4))


def test_the_stand_in_for_the_weight_tells_shape_and_dtype_but_holds_no_memory() -> None:
    weight = exact(linear(64, 32).bfloat16()).weight
    assert (weight.shape, weight.dtype, weight.device.type) == ((32, 64), torch.bfloat16, "cpu")
    assert weight.untyped_storage().nbytes() == 2
    assert weight.isnan().all()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in "ab"])
        self.blocks.append(self.blocks[0])
        self.lm_head = nn.Linear(32, 50, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.embed(ids)
        for block in self.blocks:
            hidden = block(hidden)
        logits: torch.Tensor = self.lm_head(hidden)
        return logits


def test_every_linear_of_a_model_is_replaced_and_the_tied_embedding_stays_float() -> None:
    model, ids = Tied(), torch.arange(50)
    embedding = model.embed.weight.detach().clone()
    with torch.no_grad():
        expected = model(ids)
        assert quantise_linears(model, "int8") == 3
        got = model(ids)
    assert not [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert model.blocks[0][0] is model.blocks[2][0]  # type: ignore[index]
    assert torch.equal(model.embed.weight, embedding)
    assert (got - expected).norm() < 0.05 * expected.norm()


def test_large_weights_are_rounded_in_blocks_without_a_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = noise(100, 30)
    whole = parts(weight)
    monkeypatch.setattr("shoal.exact.weights.ROWS_AT_ONCE", 7)
    assert all(map(torch.equal, parts(weight), whole))


def test_weights_published_as_4_bit_floats_are_not_rounded_again() -> None:
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    picks = torch.randint(0, 8, (24, 128), generator=torch.Generator().manual_seed(0))
    weight = magnitudes[picks] * 2.0**-7
    x = torch.eye(128) * 127  # whole numbers: their own rounding loses nothing
    assert torch.equal(quantise("int4")(weight, None)(x), x @ weight.t())
