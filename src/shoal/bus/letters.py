"""What stands in the content of a note, as text: announcements, and letters between two nodes."""

from __future__ import annotations

import base64
import binascii

import msgspec

from ..errors import BadMessage, InvalidRequest
from ..identity import Mesh
from .announcement import MAX_ANNOUNCEMENT_BYTES, Announcement
from .base import MAX_PAYLOAD_BYTES

# base64 of the largest sealed form, with room for the JSON around a letter
MAX_ANNOUNCEMENT_CHARS = (MAX_ANNOUNCEMENT_BYTES + 64) * 4 // 3
MAX_GOODBYE_CHARS = 20
MAX_LETTER_CHARS = (MAX_PAYLOAD_BYTES + 256) * 4 // 3


class Letter(msgspec.Struct, frozen=True, array_like=True):
    """`payload` is sealed for the mesh too: a private mesh hears members only."""

    topic: str
    deadline: int  # unix seconds; not to be read later
    payload: bytes


def announcement_text(mesh: Mesh, announcement: Announcement) -> str:
    """Plain JSON in a public mesh, so that any Nostr tool can show it; sealed in a private one."""
    data = announcement.encode()
    return base64.b64encode(mesh.seal(data)).decode() if mesh.is_private else data.decode()


def read_announcement(mesh: Mesh, text: str) -> Announcement:
    """The inverse. Raises BadMessage or BadProof."""
    if len(text) > MAX_ANNOUNCEMENT_CHARS:
        raise BadMessage("an announcement is too long")
    if not mesh.is_private:
        return Announcement.decode(_utf8(text))
    try:
        sealed = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise BadMessage("a sealed announcement is not base64") from None
    return Announcement.decode(mesh.open(sealed))


def believe_announcement(mesh: Mesh, text: str) -> Announcement:
    """Read it and prove who said it. Raises BadMessage or BadProof."""
    announcement = read_announcement(mesh, text)
    announcement.verify()
    return announcement


def goodbye_text(sequence: int) -> str:
    """`sequence` of the author's last announcement: it and all before it are over."""
    return str(sequence)


def read_goodbye(text: str) -> int:
    """The inverse. Raises BadMessage."""
    if not (text.isascii() and text.isdecimal() and len(text) <= MAX_GOODBYE_CHARS):
        raise BadMessage("a goodbye without the number of the last announcement")
    return int(text)


def letter_text(mesh: Mesh, payload: bytes, deadline: int) -> str:
    """Raises InvalidRequest when the payload is too large for the relays."""
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise InvalidRequest(
            f"a sealed message of {len(payload)} bytes is too large for the bus",
            hint=f"send up to {MAX_PAYLOAD_BYTES} bytes, and more over a link",
        )
    return msgspec.json.encode(Letter(mesh.topic, deadline, mesh.seal(payload))).decode()


def read_letter(mesh: Mesh, text: str, now: float) -> bytes:
    """The payload. Raises BadMessage or BadProof when it is not for our mesh, or too late."""
    if len(text) > MAX_LETTER_CHARS:
        raise BadMessage("a letter is too long")
    try:
        letter = msgspec.json.decode(_utf8(text), type=Letter)
    except (ValueError, RecursionError):
        raise BadMessage("not a letter") from None
    if letter.topic != mesh.topic or letter.deadline < now:
        raise BadMessage("a letter for another mesh, or read too late")
    return mesh.open(letter.payload)


def _utf8(text: str) -> bytes:
    return text.encode(errors="replace")
