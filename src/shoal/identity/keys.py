"""One 32-byte secret becomes the two keys of a node, its name and its card."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from pathlib import Path

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from ..errors import BadConfig
from ..units import NodeId
from . import ed25519
from .card import Card
from .words import ADJECTIVES, NOUNS

SECRET_BYTES = 32

_FILE_BYTES = 2 * SECRET_BYTES + 1  # hex and a line feed


def derive(secret: bytes, purpose: bytes, *, salt: bytes) -> bytes:
    """32 bytes for one purpose by HKDF-SHA256; different purposes tell nothing about each other."""
    return HKDF(algorithm=SHA256(), length=32, salt=salt, info=purpose).derive(secret)


def friendly_name(node: NodeId | str) -> str:
    """Two words for people, such as ``amber-otter``. Not unique: the node id is the identity."""
    digest = hashlib.sha256(node.encode()).digest()
    return f"{ADJECTIVES[digest[0]]}-{NOUNS[digest[1]]}"


class Identity:
    """The keys of this node. Secrets leave it only through the two methods named so."""

    __slots__ = ("_nostr_secret", "_transport_secret", "card", "name", "node", "transport_key")

    def __init__(self, nostr_secret: bytes, transport_secret: bytes) -> None:
        self._nostr_secret = nostr_secret
        self._transport_secret = transport_secret
        self.card = Card.issue(nostr_secret, transport_secret)
        self.node = self.card.node
        self.transport_key = self.card.transport_key
        self.name = friendly_name(self.node)

    @classmethod
    def from_secret(cls, secret: bytes) -> Identity:
        """The node of this 32-byte secret; the same secret is the same node, always."""
        if len(secret) != SECRET_BYTES:
            raise BadConfig(f"a node's secret has {SECRET_BYTES} bytes, not {len(secret)}")
        salt = b"shoal identity v1"
        return cls(derive(secret, b"nostr", salt=salt), derive(secret, b"transport", salt=salt))

    def transport_secret(self) -> bytes:
        """32 bytes, the Ed25519 seed."""
        return self._transport_secret

    def nostr_secret(self) -> bytes:
        """32 bytes, the secp256k1 secret."""
        return self._nostr_secret

    def sign(self, domain: bytes, data: bytes) -> bytes:
        """A 64-byte Ed25519 signature of the transport key; check it with `ed25519.verify`."""
        return ed25519.sign(self._transport_secret, domain, data)

    def __repr__(self) -> str:
        return f"Identity({self.name}, {self.node})"


def load_or_create(path: Path) -> Identity:
    """The identity kept in the file `path` (hex, mode 0600), made at the first call.

    Raises BadConfig when the file cannot be used; an existing file is never overwritten.
    """
    return Identity.from_secret(load_or_create_secret(path))


def load_or_create_secret(path: Path) -> bytes:
    """The 32 bytes kept in the file `path`: a node's own secret, or that of a private mesh."""
    try:
        if not path.exists():
            _create(path, secrets.token_bytes(SECRET_BYTES))
        return _read(path)
    except OSError as error:
        raise BadConfig(
            f"the secret {path} cannot be used: {error.strerror}",
            hint="check the folder's owner and permissions, or set SHOAL_HOME to one you own",
        ) from None


def _create(path: Path, secret: bytes) -> None:
    """Complete or absent, never half. If another process was first, its secret stays."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(secret.hex() + "\n")
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink()


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        text = file.read(_FILE_BYTES + 1)
    if os.name == "posix" and mode & 0o077:
        raise BadConfig(
            f"the secret {path} can be read by other users of this machine",
            hint=f"chmod 600 {path}",
        )
    try:
        secret = bytes.fromhex(text.decode("ascii").strip())
    except ValueError:
        secret = b""
    if len(secret) != SECRET_BYTES:
        raise BadConfig(
            f"{path} does not hold a secret ({2 * SECRET_BYTES} hex digits)",
            hint="restore it from your backup, or move it away to become a new node",
        )
    return secret
