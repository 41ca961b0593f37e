"""The Nostr key of a node. In this folder nostr_sdk is used here and nowhere else.

nostr_sdk has no bare Schnorr verification, so what we sign is a Nostr event of a fixed form that
never travels as one: both sides rebuild it from the bytes that are to be signed.
"""

from __future__ import annotations

import hashlib
import json

from nostr_sdk import (  # type: ignore[import-untyped]
    Event,
    EventBuilder,
    Keys,
    Kind,
    NostrSdkError,
    PublicKey,
    Timestamp,
)

from ..errors import BadProof
from ..units import NodeId

KEY_BYTES = 32
SIGNATURE_BYTES = 64

_NPUB_CHARS = 63
_PROOF_KIND = 28401  # in the ephemeral range: no relay keeps it, should one ever get it


def node_of(public_key: bytes) -> NodeId:
    """32 bytes of a Nostr public key -> npub1... Raises BadProof when the length is wrong."""
    if len(public_key) != KEY_BYTES:
        raise BadProof(f"a Nostr key has {KEY_BYTES} bytes, not {len(public_key)}")
    return NodeId(PublicKey.parse(public_key.hex()).to_bech32())


def public_key_of(node: NodeId) -> bytes:
    """npub1... -> the 32 bytes of the key. Raises BadProof on anything else."""
    if len(node) != _NPUB_CHARS or not node.startswith("npub1"):
        raise BadProof("a node id is an npub of 63 characters")
    try:
        return bytes.fromhex(PublicKey.parse(node).to_hex())
    except NostrSdkError:
        raise BadProof("a node id has a wrong checksum") from None


def node_of_secret(secret: bytes) -> NodeId:
    """The node id that belongs to a 32-byte secp256k1 secret."""
    return NodeId(Keys.parse(secret.hex()).public_key().to_bech32())


def sign(secret: bytes, text: str) -> bytes:
    """A 64-byte Schnorr signature over the canonical event that carries `text`."""
    builder = EventBuilder(Kind(_PROOF_KIND), text).custom_created_at(Timestamp.from_secs(0))
    return bytes.fromhex(json.loads(builder.finalize(Keys.parse(secret.hex())).as_json())["sig"])


def verify(node: NodeId, text: str, signature: bytes) -> None:
    """Raise BadProof unless `signature` was made by `node` over `text`."""
    author = public_key_of(node).hex()
    canonical = json.dumps(
        [0, author, 0, _PROOF_KIND, [], text], separators=(",", ":"), ensure_ascii=False
    )
    event = {
        "id": hashlib.sha256(canonical.encode()).hexdigest(),
        "pubkey": author,
        "created_at": 0,
        "kind": _PROOF_KIND,
        "tags": [],
        "content": text,
        "sig": signature.hex(),
    }
    try:
        valid = Event.from_json(json.dumps(event)).verify()
    except NostrSdkError:
        valid = False
    if not valid:
        raise BadProof(f"the Nostr signature does not belong to {node}")
