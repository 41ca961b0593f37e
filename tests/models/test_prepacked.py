import pytest
import torch
from torch import nn

from shoal.models.prepacked import PackedLinear, prepack, works


@pytest.fixture(autouse=True)
def torch_can() -> None:
    if not works():
        pytest.skip("torch has no prepacked bf16 linears on this machine")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(96, 48), (577, 131), (1, 1)])
def test_it_computes_what_the_linear_layer_computes(shape: tuple[int, int], bias: bool) -> None:
    linear = nn.Linear(*shape, bias=bias).bfloat16()
    x = torch.randn(2, 3, shape[0], generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        expected = linear(x)
        found = PackedLinear(linear)(x)
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, rtol=0.02, atol=0.02)


def test_only_bf16_layers_are_replaced_and_they_tell_their_size() -> None:
    model = nn.Sequential(nn.Linear(8, 8).bfloat16(), nn.Linear(8, 8))
    prepack(model)
    packed, plain = model
    assert isinstance(packed, PackedLinear)
    assert type(plain) is nn.Linear
    assert packed.kept_bytes == 128
    assert packed.weight.shape == (8, 8)
    assert packed.weight.dtype == torch.bfloat16
