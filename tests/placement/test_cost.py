import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.hardware import Capability, Speed
from shoal.placement import ModelShape
from shoal.placement.cost import predict, request_seconds
from shoal.units import Slice

FAST = Capability(memory_bytes_per_s=50e9, f32_flops=2e11, bf16_flops=9e11, int8_ops=17e11)
SLOW = Capability(memory_bytes_per_s=10e9, f32_flops=4e10, bf16_flops=4e10, int8_ops=1e11)
DENSE = ModelShape((40_000_000,) * 20, 60_000_000, 60_000_000, kv_bytes_per_token_per_layer=1000)
MIXED = ModelShape((40_000_000,) * 20, 0, 0, experts_bytes=32_000_000, routed=0.125)


def test_one_token_costs_about_what_reading_its_weights_costs() -> None:
    seconds = predict(FAST, DENSE, "int8", Slice(0, 10)).seconds(10)
    assert seconds == pytest.approx(10 * 40e6 / 50e9, rel=0.5)
    assert seconds > 10 * 40e6 / 50e9


def test_a_slower_machine_and_a_longer_slice_take_longer() -> None:
    fast, slow = (predict(each, DENSE, "int8", Slice(0, 10)) for each in (FAST, SLOW))
    assert slow.seconds(10) > 3 * fast.seconds(10)
    assert slow.seconds(10) > slow.seconds(5)


def test_who_has_the_head_reads_it_in_every_step() -> None:
    middle, last = (predict(FAST, DENSE, "int8", part) for part in (Slice(5, 10), Slice(15, 20)))
    assert last.step_s - middle.step_s == pytest.approx(60e6 / 50e9, rel=0.5)
    assert last.sample_s > middle.sample_s == 0


def test_smaller_weights_are_read_sooner() -> None:
    half = ModelShape((20_000_000,) * 20, 0, 0)
    assert predict(SLOW, half, "int4").layer_s < predict(SLOW, DENSE, "int8").layer_s


@given(st.integers(1, 200))
def test_few_tokens_read_few_experts_and_many_read_all(tokens: int) -> None:
    speed = predict(FAST, MIXED, "int8")
    dense = predict(FAST, ModelShape(MIXED.layer_bytes, 0, 0), "int8")
    assert speed.seconds(1, tokens) < dense.seconds(1, tokens)
    assert speed.layer_s + speed.experts_s == pytest.approx(dense.layer_s)


def test_a_node_that_measured_nothing_is_taken_for_a_modest_one() -> None:
    assert (
        predict(FAST, DENSE, "int8").seconds(10)
        < predict(Capability(), DENSE, "int8").seconds(10)
        < 1
    )


def test_those_who_share_steps_pay_less_each() -> None:
    speed = Speed(layer_s=1e-3, token_s=1e-5)
    alone, beside = (request_seconds(speed, 10, 100, 50, n) for n in (1, 10))
    assert alone == pytest.approx(10 * (100 * 1e-5 + 50 * 1.01e-3))
    assert beside < alone / 3
