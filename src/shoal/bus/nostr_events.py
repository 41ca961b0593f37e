"""The events that carry our notes over Nostr, made and opened. Needs no relay and no loop.

38400 announcement: addressable, one a node, ``t`` = topic of the mesh, expires (NIP-40)
5     goodbye: a deletion (NIP-09) of the author's announcement
21059 sealed message: an ephemeral gift wrap (NIP-59), opened by hand because the library
      opens the stored kind 1059 only
"""

from __future__ import annotations

from nostr_sdk import (  # type: ignore[import-untyped]
    Event,
    EventBuilder,
    Filter,
    Keys,
    Kind,
    NostrSdkError,
    PublicKey,
    Tag,
    Timestamp,
    UnsignedEvent,
    nip59_make_seal,
)

from ..errors import BadProof
from ..units import NodeId
from .inbox import MAX_AGE_S, Note, Unsealed

ANNOUNCEMENT = 38400
GOODBYE = 5
WRAP = 21059

_SEAL = 13
_LETTER = 8410
_ADDRESS = "node"  # the d tag: a node has one announcement


def filters(topic: str, node: NodeId, now: int) -> list[Filter]:
    """What we ask relays for: notes of our mesh, and wraps addressed to us."""
    notes = Filter().kinds([Kind(ANNOUNCEMENT), Kind(GOODBYE)]).hashtag(topic)
    wraps = Filter().kind(Kind(WRAP)).pubkey(PublicKey.parse(node))
    return [notes.since(Timestamp.from_secs(max(0, now - MAX_AGE_S))), wraps]


def announcement_event(
    keys: Keys, topic: str, text: str, *, created_at: int, expires_at: int
) -> Event:
    tags = [["d", _ADDRESS], ["t", topic], ["expiration", str(expires_at)]]
    return _event(keys, ANNOUNCEMENT, text, tags, created_at)


def goodbye_event(keys: Keys, topic: str, *, created_at: int) -> Event:
    address = _announcement_address(keys.public_key())
    tags = [["a", address], ["k", str(ANNOUNCEMENT)], ["t", topic]]
    return _event(keys, GOODBYE, "", tags, created_at)


def is_goodbye(event: Event) -> bool:
    """True when the author takes back its own announcement."""
    address = _announcement_address(event.author())
    return any(tag.to_vec()[:2] == ["a", address] for tag in event.tags())


def wrap_event(keys: Keys, to: NodeId, text: str, *, created_at: int, expires_at: int) -> Event:
    """Seal `text` for `to` and wrap it under a one-time key."""
    receiver, one_time = PublicKey.parse(to), Keys.generate()
    rumor = EventBuilder(Kind(_LETTER), text).finalize_unsigned(keys.public_key())
    seal = nip59_make_seal(keys, receiver, rumor)
    content = one_time.nip44_encrypt(receiver, seal.as_json())
    tags = [["p", receiver.to_hex()], ["expiration", str(expires_at)]]
    return _event(one_time, WRAP, content, tags, created_at)


def unseal(keys: Keys, wrap: Event) -> Unsealed:
    """Open a wrap whose own signature has been checked. Raises BadProof.

    Seal signature, kinds, and that the inner author is the one who sealed: the library seals
    a rumor in anybody's name, so the last check is the only defence against that.
    """
    try:
        seal = Event.from_json(keys.nip44_decrypt(wrap.author(), wrap.content()))
        rumor = UnsignedEvent.from_json(keys.nip44_decrypt(seal.author(), seal.content()))
        genuine = seal.verify() and seal.kind().as_u16() == _SEAL
        same_author = rumor.author().to_hex() == seal.author().to_hex()
        letter = rumor.kind().as_u16() == _LETTER
    except NostrSdkError as error:
        raise BadProof(f"a sealed message cannot be opened: {error}") from None
    if not (genuine and same_author and letter):
        raise BadProof("a sealed message is not by the node that it names")
    return Unsealed(NodeId(seal.author().to_bech32()), seal.id().to_hex(), rumor.content())


def note_of(event: Event) -> Note:
    """The parts that the inbox looks at. Raises ValueError on a malformed expiration."""
    tags = [tag.to_vec() for tag in event.tags()]
    expirations = [int(tag[1][:20]) for tag in tags if tag[0] == "expiration" and len(tag) > 1]
    return Note(
        author=NodeId(event.author().to_bech32()),
        created_at=event.created_at().as_secs(),
        expires_at=min(expirations, default=None),
        topics=tuple(tag[1] for tag in tags if tag[0] == "t" and len(tag) > 1),
        content=event.content(),
        is_genuine=event.verify,
    )


def _announcement_address(author: PublicKey) -> str:
    return f"{ANNOUNCEMENT}:{author.to_hex()}:{_ADDRESS}"


def _event(keys: Keys, kind: int, content: str, tags: list[list[str]], created_at: int) -> Event:
    builder = EventBuilder(Kind(kind), content).tags([Tag.parse(tag) for tag in tags])
    return builder.custom_created_at(Timestamp.from_secs(created_at)).finalize(keys)
