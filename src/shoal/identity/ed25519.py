"""Ed25519 signatures under a domain, and the refusal of keys that anybody can sign for."""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from ..errors import BadProof

KEY_BYTES = 32
SIGNATURE_BYTES = 64

_FIELD = 2**255 - 19
_ORDER_8 = (
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
)
_SMALL_ORDER_Y = {0, 1, _FIELD - 1} | {int.from_bytes(bytes.fromhex(y), "little") for y in _ORDER_8}


def check_public_key(key: bytes) -> bytes:
    """Return the 32-byte key, or raise BadProof when it is non-canonical or of small order.

    OpenSSL accepts signatures that anybody can make under a small-order key, so such a key
    proves nothing wherever it enters.
    """
    y = int.from_bytes(key, "little") & ((1 << 255) - 1)
    if len(key) != KEY_BYTES or y >= _FIELD or y in _SMALL_ORDER_Y:
        raise BadProof("the transport key is not a usable Ed25519 key")
    return key


def _text(domain: bytes, data: bytes) -> bytes:
    """What is signed. It starts neither like TLS's own text (64 spaces) nor like DER (0x30)."""
    if not domain or b"\0" in domain:
        raise ValueError("a domain is not empty and holds no zero byte")
    return b"shoal:" + domain + b"\0" + data


def public_key(secret: bytes) -> bytes:
    """The 32-byte public key of a 32-byte secret."""
    return Ed25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def sign(secret: bytes, domain: bytes, data: bytes) -> bytes:
    """A 64-byte signature of `data`, valid in `domain` only."""
    return Ed25519PrivateKey.from_private_bytes(secret).sign(_text(domain, data))


def verify(key: bytes, domain: bytes, data: bytes, signature: bytes) -> None:
    """Raise BadProof unless `signature` was made by `key` over `data` in `domain`."""
    check_public_key(key)
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, _text(domain, data))
    except (InvalidSignature, ValueError):
        raise BadProof(f"a signature does not fit ({domain.decode(errors='replace')})") from None
