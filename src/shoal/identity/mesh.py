"""The mesh we belong to: public under a name, or private under a shared secret."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from ..errors import BadConfig, BadProof
from .keys import derive, friendly_name
from .ticket import MAX_NAME_CHARS, SECRET_BYTES, Ticket

_NAME = re.compile(rf"[a-z0-9][a-z0-9._-]{{0,{MAX_NAME_CHARS - 1}}}")
_SALT = b"shoal mesh v1"
_NONCE_BYTES = 12
_OVERHEAD_BYTES = _NONCE_BYTES + 16


@dataclass(frozen=True, slots=True)
class Mesh:
    """`topic` is the tag that members look for on the bus; it tells nothing about a secret.

    A public mesh has a name and seals nothing. A private one has a secret of 32 bytes.
    """

    topic: str
    label: str  # for people
    name: str = ""
    secret: bytes = field(default=b"", repr=False)
    _key: bytes = field(default=b"", repr=False)

    @classmethod
    def public(cls, name: str) -> Mesh:
        """Raises BadConfig for a name that relays or shells would mangle."""
        if not _NAME.fullmatch(name):
            raise BadConfig(
                f"{name[:80]!r} cannot be the name of a mesh",
                hint=f"use up to {MAX_NAME_CHARS} of a-z, 0-9, '-', '_' and '.', such as my-club",
            )
        return cls(topic=f"shoal/{name}", label=name, name=name)

    @classmethod
    def private(cls, secret: bytes) -> Mesh:
        """Raises BadConfig unless the secret has 32 bytes."""
        if len(secret) != SECRET_BYTES:
            raise BadConfig(f"a mesh secret has {SECRET_BYTES} bytes, not {len(secret)}")
        topic = f"shoal-private/{derive(secret, b'topic', salt=_SALT)[:16].hex()}"
        key = derive(secret, b"bus seal", salt=_SALT)
        return cls(topic, f"private {friendly_name(topic)}", secret=secret, _key=key)

    @classmethod
    def of(cls, ticket: Ticket) -> Mesh:
        """The mesh that a ticket invites to."""
        return cls.private(ticket.secret) if ticket.secret else cls.public(ticket.mesh)

    @property
    def is_private(self) -> bool:
        return bool(self.secret)

    def seal(self, data: bytes) -> bytes:
        """What only members can read: 28 bytes longer. A public mesh returns `data` itself."""
        if not self.is_private:
            return data
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return nonce + ChaCha20Poly1305(self._key).encrypt(nonce, data, self.topic.encode())

    def open(self, sealed: bytes) -> bytes:
        """The inverse of `seal`. Raises BadProof when no member of this mesh sealed it."""
        if not self.is_private:
            return sealed
        if len(sealed) < _OVERHEAD_BYTES:
            raise BadProof("sealed text is too short")
        nonce, text = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
        try:
            return ChaCha20Poly1305(self._key).decrypt(nonce, text, self.topic.encode())
        except InvalidTag:
            raise BadProof("this was not sealed with the secret of our mesh") from None
