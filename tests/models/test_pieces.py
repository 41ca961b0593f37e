import pytest
import torch
from torch import nn

from shoal.errors import UnsupportedModel
from shoal.models.pieces import (
    ExactActivation,
    ExactNorm,
    ExactRotary,
    Turns,
    read_activation,
    read_norm,
    replace_pieces,
)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class RMSNorm(nn.Module):
    def __init__(self, more: float = 0.0) -> None:
        super().__init__()
        self.weight, self.variance_epsilon, self.more = nn.Parameter(noise(48)), 1e-6, more

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.pow(2).mean(-1, keepdim=True)
        result: torch.Tensor = x * torch.rsqrt(mean + self.variance_epsilon)
        return result * (self.weight + self.more)


class OddNorm(RMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act_fn = RMSNorm(), nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.act_fn(self.norm(x))
        return y


@pytest.mark.parametrize("more", [0.0, 1.0])
def test_a_norm_is_recognised_with_and_without_one_added(more: float) -> None:
    norm, x = RMSNorm(more), noise(7, 48)
    torch.testing.assert_close(read_norm(norm)(x), norm(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.GELU(approximate="tanh")])
def test_an_activation_is_recognised_by_what_it_computes(activation: nn.Module) -> None:
    x = noise(7, 48) * 3
    torch.testing.assert_close(read_activation(activation)(x), activation(x), rtol=1e-4, atol=1e-5)


def test_what_computes_something_else_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="OddNorm"):
        read_norm(OddNorm())
    with pytest.raises(UnsupportedModel, match="ReLU"):
        read_activation(nn.ReLU())
    with pytest.raises(UnsupportedModel, match="LayerNorm"):
        replace_pieces(nn.Sequential(nn.LayerNorm(4)))


def test_all_pieces_are_replaced_and_a_row_has_the_same_bits_alone() -> None:
    layer, x = Layer(), noise(37, 48)
    expected = layer(x).detach()
    replace_pieces(layer)
    assert isinstance(layer.norm, ExactNorm)
    assert isinstance(layer.act_fn, ExactActivation)
    y = layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(layer(x[at : at + 1])[0], y[at]) for at in range(37))
    replace_pieces(layer)
    assert torch.equal(layer(x), y)


class Rotary(nn.Module):
    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        angles = positions[:, None].float() * torch.tensor([1.0, 0.1, 0.01])
        return torch.polar(torch.ones_like(angles), angles)


def test_complex_rotations_are_made_of_single_operations() -> None:
    turns, x = ExactRotary(Rotary())(torch.arange(5000, 5011)), noise(11, 3, 2)
    assert isinstance(turns, Turns)
    turned = torch.view_as_complex(x) * turns
    assert type(turned) is torch.Tensor
    angle = torch.arange(5000, 5011)[:, None].float() * torch.tensor([1.0, 0.1, 0.01])
    cos, sin = angle.double().cos().float(), angle.double().sin().float()
    expected = x[..., 0] * cos - x[..., 1] * sin, x[..., 1] * cos + x[..., 0] * sin
    assert torch.equal(torch.view_as_real(turned), torch.stack(expected, -1))
