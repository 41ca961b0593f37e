"""How two nodes prove who they are inside a TLS channel. Bytes in, bytes out, no socket.

::

    server -> 32-byte nonce | card (192)
    client -> card (192) | Ed25519 by the client's transport key (64)
              over domain | server key | nonce | client key
    server -> one byte: accepted or refused

When the client speaks, TLS has already proved the server's key, and the client has compared it with
the one it dialled. So only that server learns the signature, and the server's key in it keeps that
server from using it elsewhere. All fields have fixed lengths.

Python's ssl can neither ask for an unknown self-signed client certificate nor export keying
material, hence a signature inside the channel that is not bound to it. The price: whoever steals a
server's secret can pose as its clients towards it while they are connected to the thief.
"""

from __future__ import annotations

from ..errors import BadProof
from ..identity import CARD_BYTES, Card, Identity, verify
from .base import Contact

NONCE_BYTES = 32
SIGNATURE_BYTES = 64
HELLO_BYTES = NONCE_BYTES + CARD_BYTES
ANSWER_BYTES = CARD_BYTES + SIGNATURE_BYTES
ACCEPTED = b"\x01"
REFUSED = b"\x00"

_DOMAIN = b"tls client v1"


def hello(card: Card, nonce: bytes) -> bytes:
    """What the server says first. `nonce`: 32 random bytes, used for one connection only."""
    return nonce + card.encode()


def answer(identity: Identity, contact: Contact, server_hello: bytes) -> tuple[Card, bytes]:
    """The server's card, checked against the contact, and the client's answer.

    Call it only when the channel's key is `contact.transport_key`. Raises BadProof.
    """
    nonce, server = server_hello[:NONCE_BYTES], Card.decode(server_hello[NONCE_BYTES:])
    if server.transport_key != contact.transport_key or server.node != contact.node:
        raise BadProof("another node answered")
    text = _text(contact.transport_key, nonce, identity.transport_key)
    return server, identity.card.encode() + identity.sign(_DOMAIN, text)


def check_answer(server_key: bytes, nonce: bytes, client_answer: bytes) -> Card:
    """The client's card, if the answer proves that the client holds its key. Raises BadProof."""
    card = Card.decode(client_answer[:CARD_BYTES])
    text = _text(server_key, nonce, card.transport_key)
    verify(card.transport_key, _DOMAIN, text, client_answer[CARD_BYTES:])
    return card


def _text(server_key: bytes, nonce: bytes, client_key: bytes) -> bytes:
    return server_key + nonce + client_key
