"""The card of a node: proof that one Nostr key and one transport key are the same node's."""

from __future__ import annotations

import msgspec

from ..errors import BadProof
from ..units import NodeId
from . import ed25519, nostr_keys

CARD_BYTES = 192  # Nostr key 32 | transport key 32 | Schnorr signature 64 | Ed25519 signature 64

_DOMAIN = b"card v1"


def _claim(transport_key: bytes) -> str:
    """What the Nostr key signs."""
    return f"shoal card v1 {transport_key.hex()}"


class Card(msgspec.Struct, frozen=True):
    """Each key signs the other, so neither can be put on somebody else's card.

    Sizes in bytes: transport_key 32 (Ed25519, public), nostr_signature 64 (Schnorr),
    transport_signature 64 (Ed25519). A decoded struct is unproven until `verify` has passed.
    """

    node: NodeId
    transport_key: bytes
    nostr_signature: bytes
    transport_signature: bytes

    @classmethod
    def issue(cls, nostr_secret: bytes, transport_secret: bytes) -> Card:
        """Make the card of the node that holds both secrets (32 bytes each)."""
        node = nostr_keys.node_of_secret(nostr_secret)
        key = ed25519.public_key(transport_secret)
        public = nostr_keys.public_key_of(node)
        return cls(
            node=node,
            transport_key=key,
            nostr_signature=nostr_keys.sign(nostr_secret, _claim(key)),
            transport_signature=ed25519.sign(transport_secret, _DOMAIN, public),
        )

    def verify(self) -> None:
        """Raise BadProof unless both keys vouch for each other and the transport key is usable."""
        public = nostr_keys.public_key_of(self.node)
        ed25519.verify(self.transport_key, _DOMAIN, public, self.transport_signature)
        nostr_keys.verify(self.node, _claim(self.transport_key), self.nostr_signature)

    def encode(self) -> bytes:
        """192 bytes of fixed layout."""
        public = nostr_keys.public_key_of(self.node)
        return public + self.transport_key + self.nostr_signature + self.transport_signature

    @classmethod
    def decode(cls, data: bytes) -> Card:
        """Read and verify 192 bytes. Raises BadProof on anything else."""
        if len(data) != CARD_BYTES:
            raise BadProof(f"a card has {CARD_BYTES} bytes, not {len(data)}")
        card = cls(nostr_keys.node_of(data[:32]), data[32:64], data[64:128], data[128:])
        card.verify()
        return card
