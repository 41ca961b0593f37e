"""What a GPU computes in the exact class: its ways of multiplying, run here on the CPU."""

import pytest
import torch

from shoal.exact import devices, native
from shoal.exact.attention import _exact_product
from shoal.exact.linear import Linear
from shoal.exact.numbers import divided
from shoal.exact.product import Expanding, by_float64, by_int_mm, packed_4_bits
from shoal.exact.weights import quantise_int4, quantise_int8, quantise_rows


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 64, 32), (5, 100, 33), (40, 7, 9)])
def test_a_gpus_integer_product_is_filled_up_to_the_shapes_that_it_takes(
    rows: int, inputs: int, outputs: int
) -> None:
    codes, _ = quantise_rows(noise(rows, inputs))
    weights = quantise_int8(noise(outputs, inputs)).codes
    assert torch.equal(by_int_mm(codes, weights).double(), by_float64(codes, weights))


@pytest.mark.parametrize("inputs", [96, 100])
def test_weights_of_4_bits_that_are_expanded_for_each_product_give_the_same_bits(
    inputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Expanding, "ROWS", 20)  # several blocks
    weight = quantise_int4(noise(50, inputs))
    x = noise(3, inputs)
    codes, scale = quantise_rows(x)
    way = Expanding(weight)
    assert torch.equal(way(codes).mul_(scale), Linear(weight)(x))
    assert way.nbytes < 0.6 * 50 * 128 + 4 * 50


def test_two_codes_share_a_byte() -> None:
    packed = packed_4_bits(torch.tensor([[1, 2, 15]], dtype=torch.uint8))
    assert packed.shape == (1, 16)
    assert packed[0, :2].tolist() == [0x21, 0x0F]


def test_sums_of_codes_are_exact_in_the_ten_bits_of_tensor_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever allows TF32 products changes no bit: all operands fit."""
    plain = torch.Tensor.__matmul__

    def short(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        for x in (one, other):
            assert x.dtype == torch.float64 or not (x.view(torch.int32) & 0x1FFF).any()
        return plain(one, other)

    monkeypatch.setattr(torch.Tensor, "__matmul__", short)
    chance = torch.Generator().manual_seed(0)
    for limit, base, terms in ((2047, 64.0, 256), (8191, 128.0, 128)):
        codes = torch.randint(-limit, limit + 1, (4, terms), generator=chance).float()
        codes[0] = limit
        matrix = torch.randint(-2047, 2048, (terms, 5), generator=chance).float()
        expected = plain(codes.double(), matrix.double()).float()
        assert torch.equal(_exact_product(codes, matrix, base), expected)


def test_a_quotient_is_one_division_on_every_device() -> None:
    x = noise(1000)
    assert torch.equal(divided(x.clone(), 127.0), x / 127.0)
    assert divided(x, 127.0) is x


def test_every_piece_of_the_self_test_is_the_same_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another device than the CPU is stood in for by the CPU without the compiled library."""
    cpu = torch.device("cpu")
    compiled = [list(piece(cpu)) for piece in devices.PIECES]
    monkeypatch.setattr(native, "load", lambda: None)
    for piece, expected in zip(devices.PIECES, compiled, strict=True):
        found = list(piece(cpu))
        assert len(found) == len(expected)
        assert all(map(torch.equal, found, expected))


def test_a_device_with_other_bits_or_without_an_operation_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = torch.device("cpu")
    assert all(devices._agrees(piece, cpu) for piece in devices.PIECES)
    calls = iter(range(100))
    plain = devices.rms_norm

    def off_by_a_bit(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return plain(x, weight, eps) if next(calls) else plain(x, weight, eps) * (1 + 2**-23)

    monkeypatch.setattr(devices, "rms_norm", off_by_a_bit)
    assert not devices._agrees(devices._numbers, cpu)
    assert devices.computes_exactly("cpu")
    assert not devices.computes_exactly("meta")
