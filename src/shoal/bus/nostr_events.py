"""The events that carry our notes over Nostr, made and opened. Needs no relay and no loop.

38400 announcement: addressable, one a node, ``t`` = its cells of the mesh, expires (NIP-40)
5     goodbye: a deletion (NIP-09) of the author's announcement
21059 sealed message: an ephemeral gift wrap (NIP-59), opened by hand because the library
      opens the stored kind 1059 only
"""

from __future__ import annotations

from collections.abc import Sequence

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
from .base import MAX_KEPT
from .cells import cell_of, tag
from .inbox import MAX_AGE_S, Note, Unsealed
from .stamps import MAX_SKEW_S

ANNOUNCEMENT = 38400
GOODBYE = 5
WRAP = 21059

_SEAL = 13
_MAX_ERAS = 8
_LETTER = 8410
_ADDRESS = "node"  # the d tag: a node has one announcement


def filters(topic: str, node: NodeId, now: int, depth: int = 0) -> list[Filter]:
    """What we ask relays for: notes of our cell of the mesh, and wraps addressed to us. Our clock
    may be wrong: what is too old is sorted out here, not there.
    """
    notes = Filter().kinds([Kind(ANNOUNCEMENT), Kind(GOODBYE)])
    notes = notes.hashtag(tag(topic, cell_of(node), depth)).limit(MAX_KEPT)
    wraps = Filter().kind(Kind(WRAP)).pubkey(PublicKey.parse(node))
    since = max(0, now - MAX_AGE_S - int(MAX_SKEW_S))
    return [notes.since(Timestamp.from_secs(since)), wraps]


def announcement_event(
    keys: Keys, topics: Sequence[str], text: str, *, created_at: int, expires_at: int, era: int = 0
) -> Event:
    """`era`: how often our stamps may have gone back. A relay that holds a later one would not take
    this in its place, so it gets another address.
    """
    tags = [["d", _address(era)], *(["t", topic] for topic in topics)]
    tags.append(["expiration", str(expires_at)])
    return _event(keys, ANNOUNCEMENT, text, tags, created_at)


def goodbye_event(
    keys: Keys, topics: Sequence[str], text: str, *, created_at: int, era: int = 0
) -> Event:
    addresses = [_announcement_address(keys.public_key(), each) for each in range(era + 1)]
    tags = [["a", address] for address in addresses[-_MAX_ERAS:]]
    tags += [["k", str(ANNOUNCEMENT)], *(["t", topic] for topic in topics)]
    return _event(keys, GOODBYE, text, tags, created_at)


def is_goodbye(event: Event) -> bool:
    """True when the author takes back its own announcement."""
    address = _announcement_address(event.author())
    said = [tag.to_vec() for tag in event.tags()]
    return any(tag[0] == "a" and len(tag) > 1 and tag[1].startswith(address) for tag in said)


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


def _address(era: int) -> str:
    return f"{_ADDRESS}{era}" if era else _ADDRESS


def _announcement_address(author: PublicKey, era: int = 0) -> str:
    return f"{ANNOUNCEMENT}:{author.to_hex()}:{_address(era)}"


def _event(keys: Keys, kind: int, content: str, tags: list[list[str]], created_at: int) -> Event:
    builder = EventBuilder(Kind(kind), content).tags([Tag.parse(tag) for tag in tags])
    return builder.custom_created_at(Timestamp.from_secs(created_at)).finalize(keys)
