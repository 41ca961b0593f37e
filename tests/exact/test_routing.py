import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.exact import native
from shoal.exact.routing import Linear16, Routing, added, route, softmax


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_row_has_the_bits_of_64_bit_integers_alone_and_among_others() -> None:
    weight, bias, x = noise(37, 301, seed=1), noise(37, seed=2), noise(19, 301)
    linear = Linear16(weight, bias)
    y = linear(x)
    scale = x.abs().amax(1) / 2047
    codes = (x / scale[:, None]).round().long()
    weight_scale = weight.abs().amax(1) / 2047
    sums = codes @ (weight / weight_scale[:, None]).round().long().t()
    assert torch.equal(y, sums.float() * weight_scale * scale[:, None] + bias)
    assert all(torch.equal(linear(x[i : i + 1])[0], y[i]) for i in range(19))


def test_without_the_compiled_library_the_bits_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, bias, x = noise(37, 301, seed=1), noise(37, seed=2), noise(19, 301)
    expected = Linear16(weight, bias)(x)
    monkeypatch.setattr(native, "load", lambda: None)
    assert torch.equal(Linear16(weight, bias)(x), expected)


def test_a_product_of_12_bits_is_good_to_a_thousandth() -> None:
    weight, x = noise(64, 1024, seed=1), noise(8, 1024)
    exact = x.double() @ weight.double().t()
    assert (Linear16(weight)(x) - exact).norm() < 1e-3 * exact.norm()


def test_the_softmax_is_that_of_torch_and_adds_up_to_one() -> None:
    x = noise(9, 50) * 6
    torch.testing.assert_close(softmax(x), x.softmax(-1), rtol=1e-5, atol=1e-8)


HOW = [
    Routing(top=3, normed=True),
    Routing(top=3, score="sigmoid", normed=True, scale=2.5),
    Routing(top=3, score="chosen"),
    Routing(top=3, score="sigmoid", groups=4, kept=2, group_best=2),
    Routing(top=2, groups=4, kept=1),
]


@pytest.mark.parametrize("how", HOW)
def test_a_token_is_routed_alone_as_among_others(how: Routing) -> None:
    products, correction = noise(23, 16) * 3, noise(16, seed=4) * 0.1
    weights, chosen = route(products, how, correction)
    assert chosen.shape == weights.shape == (23, how.top)
    assert (chosen.diff(dim=1) > 0).all()
    for i in range(23):
        alone = route(products[i : i + 1], how, correction)
        assert torch.equal(alone[0][0], weights[i])
        assert torch.equal(alone[1][0], chosen[i])


def test_groups_that_are_not_kept_give_no_expert() -> None:
    products = torch.tensor([[9.0, 0.0, 5.0, 5.0, 6.0, 3.0]])
    how = Routing(top=2, score="sigmoid", groups=3, kept=1)
    assert route(products, how)[1].tolist() == [[0, 1]]
    pairs = Routing(top=2, score="chosen", groups=3, kept=1, group_best=2)
    assert route(products - 9.0, pairs)[1].tolist() == [[2, 3]]  # -4 - 4 beats 0 - 9 and -3 - 6


def test_of_equal_experts_the_first_is_chosen() -> None:
    assert route(torch.ones(2, 300), Routing(top=4))[1].tolist() == [[0, 1, 2, 3]] * 2


def test_a_correction_changes_the_choice_but_no_weight() -> None:
    products, correction = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0.0, 0.0, 5.0])
    weights, chosen = route(products, Routing(top=1, score="sigmoid"), correction)
    assert chosen.item() == 2
    assert weights.item() == 0.5


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 99))
def test_columns_are_added_from_left_to_right(rows: int, columns: int, seed: int) -> None:
    x = noise(rows, columns, seed=seed)
    for row, total in zip(x, added(x), strict=True):
        expected = torch.zeros(())
        for value in row:
            expected = expected + value
        assert total == expected
