"""Invitations: everything a second machine needs to join, in one string that survives copying.

``SHOAL1`` and then base32 of: 5 bytes of SHA-256 | msgpack [mesh, secret, relays, addresses].
Upper case and digits only, so that a QR code stores it in its dense mode.
"""

from __future__ import annotations

import base64
import binascii
import hashlib

import msgspec

from ..errors import BadTicket
from .places import check_relay_url, split_address

PREFIX = "SHOAL1"
SECRET_BYTES = 32
MAX_NAME_CHARS = 64
MAX_RELAYS = 8
MAX_ADDRESSES = 16

_CHECKSUM_BYTES = 5
_MAX_TICKET_CHARS = 8192
_COPY_AGAIN = "copy the whole ticket again, from SHOAL1 to its last character"


class Ticket(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Exactly one of `mesh` (a public name) and `secret` (32 bytes) is set.

    `relays` are ws:// or wss:// URLs, `addresses` host:port of nodes to try directly.
    Raises BadTicket when a part is missing, malformed or too long.
    """

    mesh: str = ""
    secret: bytes = b""
    relays: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if bool(self.mesh) == bool(self.secret):
            raise BadTicket("a ticket names either a public mesh or the secret of a private one")
        if len(self.mesh) > MAX_NAME_CHARS or len(self.secret) not in (0, SECRET_BYTES):
            raise BadTicket("a ticket's mesh name or secret has a wrong length")
        if len(self.relays) > MAX_RELAYS or len(self.addresses) > MAX_ADDRESSES:
            raise BadTicket(
                f"a ticket holds up to {MAX_RELAYS} relays and {MAX_ADDRESSES} addresses"
            )
        try:
            for url in self.relays:
                check_relay_url(url)
            for address in self.addresses:
                split_address(address)
        except ValueError as error:
            raise BadTicket(f"the ticket points nowhere: {error}") from None

    def __repr__(self) -> str:
        mesh = self.mesh or "private"
        return f"Ticket({mesh!r}, relays={self.relays}, addresses={self.addresses})"

    def encode(self) -> str:
        """The string that is copied."""
        body = msgspec.msgpack.encode(self)
        return PREFIX + base64.b32encode(_checksum(body) + body).decode().rstrip("=")

    @classmethod
    def decode(cls, text: str) -> Ticket:
        """Read a pasted ticket; case, spaces and line breaks do not matter. Raises BadTicket."""
        body = _unpack(_normalised(text))
        try:
            return msgspec.msgpack.decode(body, type=cls)
        except (ValueError, RecursionError):  # what msgspec raises on a stranger's bytes
            raise BadTicket(
                "this ticket was made by a different version of shoal",
                hint="update shoal on both machines and run `shoal invite` again",
            ) from None


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(b"shoal ticket v1\0" + body).digest()[:_CHECKSUM_BYTES]


def _normalised(text: str) -> str:
    if len(text) > 2 * _MAX_TICKET_CHARS:
        raise BadTicket("this is too long to be a ticket", hint=_COPY_AGAIN)
    code = "".join(text.split())
    if not code.isascii() or not code.upper().startswith(PREFIX) or len(code) > _MAX_TICKET_CHARS:
        raise BadTicket(f"this is not a ticket: tickets start with {PREFIX}", hint=_COPY_AGAIN)
    return code.upper()


def _unpack(code: str) -> bytes:
    text = code.removeprefix(PREFIX)
    try:
        packed = base64.b32decode(text + "=" * (-len(text) % 8))
    except binascii.Error:
        packed = b""
    canonical = base64.b32encode(packed).decode().rstrip("=") == text
    body = packed[_CHECKSUM_BYTES:]
    if not canonical or packed[:_CHECKSUM_BYTES] != _checksum(body):
        raise BadTicket("the ticket is damaged: its checksum does not fit", hint=_COPY_AGAIN)
    return body
