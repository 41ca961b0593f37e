import pytest
import torch

from shoal.exact import native
from shoal.exact.experts import Experts, Gate, Grouped
from shoal.exact.linear import Linear
from shoal.exact.weights import Int4Weight, Int8Weight, quantise_int4, quantise_int8

GATES = [Gate(), Gate("gelu_tanh"), Gate("clamped", 1.702, 7.0)]
ROUNDINGS = [quantise_int8, quantise_int4]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linears(
    count: int, outputs: int, inputs: int, seed: int, quantise: object = quantise_int8
) -> list[Linear]:
    weights = noise(count, outputs, inputs, seed=seed)
    biases = noise(count, outputs, seed=seed + 1)
    assert callable(quantise)
    return [Linear(quantise(w), b) for w, b in zip(weights, biases, strict=True)]


def make(gate: Gate, quantise: object = quantise_int8) -> Experts:
    up, down = linears(6, 64, 48, 1, quantise), linears(6, 48, 32, 5, quantise)
    return Experts(up, down, gate)


def test_every_row_is_computed_by_its_own_linear() -> None:
    some, x = linears(4, 24, 40, 3), noise(9, 40)
    y = Grouped(some)(x, torch.tensor([0, 2, 2, 8, 9], dtype=torch.int32))
    expected = [some[0](x[:2]), some[2](x[2:8]), some[3](x[8:])]
    assert torch.equal(y, torch.cat(expected))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("quantise", ROUNDINGS)
def test_a_token_has_the_same_bits_alone_and_in_any_batch(gate: Gate, quantise: object) -> None:
    experts, x = make(gate, quantise), noise(17, 48)
    chosen = torch.stack([torch.randperm(6)[:3] for _ in range(17)])
    weights = noise(17, 3, seed=9).abs()
    together = experts(x, chosen, weights)
    for i in range(17):
        alone = experts(x[i : i + 1], chosen[i : i + 1].flip(1), weights[i : i + 1].flip(1))
        assert torch.equal(alone[0], together[i])
    order = torch.randperm(17)
    assert torch.equal(experts(x[order], chosen[order], weights[order]), together[order])


def test_experts_compute_the_weighted_sum_of_gated_feed_forwards() -> None:
    experts, x = make(Gate()), noise(3, 48)
    chosen, weights = torch.tensor([[1, 4], [0, 1], [5, 2]]), noise(3, 2, seed=9).abs()
    expected = torch.zeros(3, 48)
    for token in range(3):
        for slot in range(2):
            e, row = int(chosen[token, slot]), x[token : token + 1]
            gate, up = experts.gate_up.linears[e](row).chunk(2, -1)
            down = experts.down.linears[e](torch.nn.functional.silu(gate) * up)
            expected[token] += weights[token, slot] * down[0]
    assert (experts(x, chosen, weights) - expected).norm() < 0.01 * expected.norm()


def test_a_clamped_gate_is_that_of_its_formula() -> None:
    x = noise(5, 32) * 8
    gate, up = x[:, :16].clamp(max=7.0), x[:, 16:].clamp(-7.0, 7.0)
    expected = gate * torch.sigmoid(gate * 1.702) * (up + 1)
    torch.testing.assert_close(GATES[2](x), expected, rtol=1e-5, atol=1e-6)


def test_the_roundings_are_those_they_are_called() -> None:
    kinds = (Int8Weight, Int4Weight)
    assert [type(quantise(noise(4, 32))) for quantise in ROUNDINGS] == list(kinds)


@pytest.mark.parametrize("quantise", ROUNDINGS)
def test_without_the_compiled_library_the_bits_are_the_same(
    quantise: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, chosen, weights = noise(5, 48), torch.tensor([[2, 0]] * 5), noise(5, 2, seed=9).abs()
    expected = make(Gate(), quantise)(x, chosen, weights)
    monkeypatch.setattr(native, "load", lambda: None)
    plain = make(Gate(), quantise)
    assert plain.down.linears[0].compiled is None
    assert torch.equal(plain(x, chosen, weights), expected)
