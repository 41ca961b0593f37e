import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engine.wire import hidden_from_wire, hidden_to_wire
from shoal.errors import BadMessage
from shoal.models.slice import DTYPES


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5])
def test_hidden_states_come_back_bit_for_bit(dtype: str, tokens: int) -> None:
    sent = torch.randn(tokens, 24).to(DTYPES[dtype])
    wire = hidden_to_wire(sent)
    assert wire.nbytes == tokens * 24 * sent.dtype.itemsize
    for received in (bytes(wire), bytearray(wire), memoryview(wire)):
        assert torch.equal(hidden_from_wire(received, dtype, 24, tokens), sent)


def test_what_starts_at_an_odd_byte_is_read_all_the_same() -> None:
    sent = torch.randn(3, 8)
    frame = bytearray(b"x" + bytes(hidden_to_wire(sent)))
    received = hidden_from_wire(memoryview(frame)[1:], "f32", 8)
    assert torch.equal(received, sent)
    assert received.data_ptr() % 16 == 0


def test_rows_that_are_not_contiguous_are_sent_in_order() -> None:
    sent = torch.arange(24.0).view(6, 4)[::2]
    assert torch.equal(hidden_from_wire(hidden_to_wire(sent), "f32", 4), sent)


def test_no_gradient_stands_in_the_way() -> None:
    assert hidden_to_wire(torch.ones(1, 4, requires_grad=True)).nbytes == 16


@settings(max_examples=60)
@given(st.integers(0, 100), st.sampled_from([None, 1, 3]))
def test_bytes_of_a_wrong_length_are_the_peers_fault(length: int, count: int | None) -> None:
    fits = length > 0 and length % 16 == 0 and count in (None, length // 16)
    if fits:
        assert hidden_from_wire(bytes(length), "bf16", 8, count).shape == (length // 16, 8)
    else:
        with pytest.raises(BadMessage):
            hidden_from_wire(bytes(length), "bf16", 8, count)
