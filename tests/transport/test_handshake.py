import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import BadProof
from shoal.identity import Card, Identity
from shoal.transport import Contact
from shoal.transport.handshake import ANSWER_BYTES, HELLO_BYTES, answer, check_answer, hello
from tests.transport.nodes import AMBER, BIRCH, MALLORY

NONCE = bytes(range(32))


def contact(identity: Identity) -> Contact:
    return Contact(identity.node, identity.transport_key, ())


def good_answer() -> bytes:
    return answer(AMBER, contact(BIRCH), hello(BIRCH.card, NONCE))[1]


def test_each_side_learns_the_others_card() -> None:
    server_hello = hello(BIRCH.card, NONCE)
    server, proof = answer(AMBER, contact(BIRCH), server_hello)
    assert len(server_hello) == HELLO_BYTES
    assert len(proof) == ANSWER_BYTES
    assert server == BIRCH.card
    assert check_answer(BIRCH.transport_key, NONCE, proof) == AMBER.card


def test_an_answer_for_another_nonce_is_refused() -> None:
    with pytest.raises(BadProof):
        check_answer(BIRCH.transport_key, os.urandom(32), good_answer())


def test_an_answer_made_for_another_server_is_refused() -> None:
    with pytest.raises(BadProof):
        check_answer(MALLORY.transport_key, NONCE, good_answer())


def test_a_card_without_its_key_is_refused() -> None:
    stolen = AMBER.card.encode() + good_answer_of(MALLORY)[-64:]
    with pytest.raises(BadProof):
        check_answer(BIRCH.transport_key, NONCE, stolen)


def good_answer_of(identity: Identity) -> bytes:
    return answer(identity, contact(BIRCH), hello(BIRCH.card, NONCE))[1]


def test_a_signature_for_another_purpose_is_refused() -> None:
    text = BIRCH.transport_key + NONCE + AMBER.transport_key
    other = AMBER.card.encode() + AMBER.sign(b"something else", text)
    with pytest.raises(BadProof):
        check_answer(BIRCH.transport_key, NONCE, other)


@pytest.mark.parametrize("y", [0, 1, 2**255 - 20, 2**255 - 19, 2**255 - 18])
def test_keys_that_anybody_can_sign_for_are_refused(y: int) -> None:
    weak = y.to_bytes(32, "little")
    card = Card(AMBER.node, weak, AMBER.card.nostr_signature, bytes([1]) + bytes(63))
    with pytest.raises(BadProof, match="not a usable"):
        check_answer(BIRCH.transport_key, NONCE, card.encode() + bytes([1]) + bytes(63))


def test_a_server_with_another_card_gets_no_answer() -> None:
    with pytest.raises(BadProof, match="another node"):
        answer(AMBER, contact(BIRCH), hello(MALLORY.card, NONCE))
    stale = Contact(MALLORY.node, BIRCH.transport_key, ())
    with pytest.raises(BadProof, match="another node"):
        answer(AMBER, stale, hello(BIRCH.card, NONCE))


@settings(max_examples=50)
@given(st.integers(0, ANSWER_BYTES * 8 - 1))
def test_no_bit_of_an_answer_can_be_changed(bit: int) -> None:
    proof = bytearray(good_answer())
    proof[bit // 8] ^= 1 << bit % 8
    with pytest.raises(BadProof):
        check_answer(BIRCH.transport_key, NONCE, bytes(proof))


@given(st.binary(min_size=ANSWER_BYTES, max_size=ANSWER_BYTES))
def test_random_answers_raise_nothing_but_bad_proof(proof: bytes) -> None:
    with pytest.raises(BadProof):
        check_answer(BIRCH.transport_key, NONCE, proof)
