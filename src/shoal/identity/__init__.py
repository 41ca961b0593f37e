"""Who am I: one secret, the two keys made from it, and what other nodes need to believe them.

Knows: the Nostr key (secp256k1) and the transport key (Ed25519) of a node, the card that ties
them together, the mesh we belong to, tickets that invite others into it.
Does not know: sockets, relays, models, money. It touches one file: the secret.
Start reading at `keys.py`.
"""

from .card import CARD_BYTES, Card
from .ed25519 import check_public_key, sign, verify
from .keys import Identity, friendly_name, load_or_create, load_or_create_secret
from .mesh import Mesh
from .nostr_keys import node_of, public_key_of
from .ticket import SECRET_BYTES, Ticket

__all__ = [
    "CARD_BYTES",
    "SECRET_BYTES",
    "Card",
    "Identity",
    "Mesh",
    "Ticket",
    "check_public_key",
    "friendly_name",
    "load_or_create",
    "load_or_create_secret",
    "node_of",
    "public_key_of",
    "sign",
    "verify",
]
