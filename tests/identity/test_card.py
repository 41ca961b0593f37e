import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import BadProof
from shoal.identity import CARD_BYTES, Card, Identity, ed25519, nostr_keys
from shoal.units import NodeId

AMBER = Identity.from_secret(b"a" * 32)
BIRCH = Identity.from_secret(b"b" * 32)
ENCODED = AMBER.card.encode()


def test_a_card_survives_its_encoding() -> None:
    assert len(ENCODED) == CARD_BYTES
    assert Card.decode(ENCODED) == AMBER.card


@settings(max_examples=40)
@given(at=st.integers(0, CARD_BYTES - 1), change=st.integers(1, 255))
def test_a_card_with_any_changed_byte_is_refused(at: int, change: int) -> None:
    changed = bytearray(ENCODED)
    changed[at] ^= change
    with pytest.raises(BadProof):
        Card.decode(bytes(changed))


@settings(max_examples=40)
@given(st.binary(max_size=2 * CARD_BYTES))
def test_garbage_is_not_a_card(data: bytes) -> None:
    with pytest.raises(BadProof):
        Card.decode(data)


@pytest.mark.parametrize("part", [slice(0, 32), slice(32, 64), slice(64, 128), slice(128, 192)])
def test_no_part_of_a_card_can_come_from_another_node(part: slice) -> None:
    swapped = bytearray(ENCODED)
    swapped[part] = BIRCH.card.encode()[part]
    with pytest.raises(BadProof):
        Card.decode(bytes(swapped))


@pytest.mark.parametrize("node", ["", "npub1", "a" * 64, "npub1" + "q" * 58, AMBER.node.upper()])
def test_a_card_names_its_node_by_a_valid_npub(node: str) -> None:
    card = Card(
        NodeId(node),
        AMBER.transport_key,
        AMBER.card.nostr_signature,
        AMBER.card.transport_signature,
    )
    with pytest.raises(BadProof):
        card.verify()


def test_a_small_order_transport_key_is_refused_even_with_a_signature_that_openssl_accepts() -> (
    None
):
    identity_point = (1).to_bytes(32, "little")
    forged = identity_point + bytes(32)  # valid for every message under that key
    card = Card(
        AMBER.node,
        identity_point,
        nostr_keys.sign(AMBER.nostr_secret(), f"shoal card v1 {identity_point.hex()}"),
        forged,
    )
    with pytest.raises(BadProof, match="not a usable"):
        card.verify()


@pytest.mark.parametrize("y", [0, 1, ed25519._FIELD - 1, ed25519._FIELD, ed25519._FIELD + 1])
@pytest.mark.parametrize("sign_bit", [0, 1 << 255])
def test_small_order_and_non_canonical_keys_are_refused(y: int, sign_bit: int) -> None:
    with pytest.raises(BadProof):
        ed25519.check_public_key((y | sign_bit).to_bytes(32, "little"))


def test_a_signature_is_valid_in_its_domain_only() -> None:
    signature = AMBER.sign(b"one", b"data")
    ed25519.verify(AMBER.transport_key, b"one", b"data", signature)
    for domain, data in ((b"two", b"data"), (b"one", b"Data"), (b"on", b"edata")):
        with pytest.raises(BadProof):
            ed25519.verify(AMBER.transport_key, domain, data, signature)


def test_a_domain_cannot_run_into_the_data() -> None:
    with pytest.raises(ValueError, match="zero byte"):
        AMBER.sign(b"one\0", b"data")


def test_a_nostr_signature_is_valid_for_its_text_and_author_only() -> None:
    text = 'text "quoted" ü \n'
    signature = nostr_keys.sign(AMBER.nostr_secret(), text)
    nostr_keys.verify(AMBER.node, text, signature)
    for node, said, proof in (
        (AMBER.node, "other", signature),
        (BIRCH.node, text, signature),
        (AMBER.node, text, b""),
    ):
        with pytest.raises(BadProof):
            nostr_keys.verify(node, said, proof)
