"""What a node says about itself to its mesh, signed and bounded."""

from __future__ import annotations

import math
from typing import Literal

import msgspec
from msgspec.structs import replace

from ..errors import BadMessage
from ..hardware import Capability, Speed
from ..identity import Card, Identity, ed25519
from ..identity.places import split_address
from ..units import ModelId, NodeId, Slice
from .coordinates import Coordinates

MAX_ANNOUNCEMENT_BYTES = 16 << 10
MAX_STAGES = 32
MAX_ADDRESSES = 16
MAX_HINTS = 16  # of lost nodes, and of wanted models
MAX_LAYERS = 4096
MAX_LIFETIME_S = 3600.0
MAX_NAME_CHARS = 64
MAX_TEXT_CHARS = 200

_DOMAIN = b"announcement v1"
_MAX_COUNT = 1 << 53  # what every JSON reader keeps exact


class StageOffer(msgspec.Struct, frozen=True):
    """A slice in service on a node. Raises ValueError when a field is out of bounds."""

    model: ModelId
    model_name: str
    total_layers: int
    layers: Slice
    compute: Literal["f32", "bf16", "f16", "int8", "int4", "w8", "w4", "gguf", "served"]
    state: Literal["joining", "serving", "draining"]
    speed: Speed
    sessions: int  # that run
    queue: int  # that wait
    free_tokens: int  # room in the KV cache
    total_tokens: int
    context_length: int
    pinned: bool = False  # chosen by hand: it never moves

    def __post_init__(self) -> None:
        _check_text(self.model, self.model_name)
        _check_numbers(
            self.sessions, self.queue, self.free_tokens, self.total_tokens, self.context_length
        )
        if not self.layers.stop <= self.total_layers <= MAX_LAYERS:
            raise ValueError(f"layers {self.layers} of {self.total_layers}")


class Demand(msgspec.Struct, frozen=True, array_like=True):
    """What a gateway's clients ask of one model; what they could not be given counts as well."""

    model: ModelId
    tokens_per_s: float

    def __post_init__(self) -> None:
        _check_text(self.model)
        _check_numbers(self.tokens_per_s)


class Loss(msgspec.Struct, frozen=True, array_like=True):
    """A node that we lost and could not reach again, and its announcement that we knew then: a
    newer one refutes it.
    """

    node: NodeId
    sequence: int

    def __post_init__(self) -> None:
        _check_text(self.node)
        _check_numbers(self.sequence)


class Announcement(msgspec.Struct, frozen=True):
    """A node's card, its measured capability, its addresses and the stages it serves.

    `sequence` grows with every announcement, over restarts too (start from the clock).
    A decoded struct is within bounds but unproven until `verify` has passed.
    """

    card: Card
    name: str
    addresses: tuple[str, ...]  # host:port or [v6]:port
    capability: Capability
    stages: tuple[StageOffer, ...]
    gateway: bool
    software: str
    sequence: int
    sent_at: int  # unix seconds
    offered_bytes: int = 0  # memory for slices; 0 = this node serves nothing
    can_serve: tuple[ModelId, ...] = ()  # models whose files it has or may fetch
    place: Coordinates = Coordinates()
    demand: tuple[Demand, ...] = ()
    lost: tuple[Loss, ...] = ()
    lifetime_s: float = 120.0  # after it this is not true any more, unless said again
    signature: bytes = b""  # Ed25519 of the transport key over all the rest

    def __post_init__(self) -> None:
        _check_text(self.name, self.software, limit=MAX_NAME_CHARS)
        _check_numbers(self.sequence, self.sent_at, self.offered_bytes)
        _check_text(*self.can_serve)
        _check_text(self.capability.cpu, *(device.name for device in self.capability.devices))
        if max(len(self.stages), len(self.can_serve)) > MAX_STAGES:
            raise ValueError("too many stages")
        if max(len(self.demand), len(self.lost)) > MAX_HINTS:
            raise ValueError("too many hints")
        if not 0 < self.lifetime_s <= MAX_LIFETIME_S:
            raise ValueError(f"a lifetime of {self.lifetime_s} s")
        if len(self.addresses) > MAX_ADDRESSES:
            raise ValueError("too many addresses")
        for address in self.addresses:
            split_address(address)

    @property
    def node(self) -> NodeId:
        return self.card.node

    def _signed_bytes(self) -> bytes:
        return msgspec.msgpack.encode(replace(self, signature=b""))

    def sign(self, identity: Identity) -> Announcement:
        """A copy with our signature. The card must be `identity`'s own."""
        return replace(self, signature=identity.sign(_DOMAIN, self._signed_bytes()))

    def verify(self) -> None:
        """Raise BadProof unless the card holds and its transport key signed this."""
        self.card.verify()
        data = self._signed_bytes()
        ed25519.verify(self.card.transport_key, _DOMAIN, data, self.signature)

    def encode(self) -> bytes:
        """JSON. Raises ValueError above MAX_ANNOUNCEMENT_BYTES: offer fewer stages."""
        data = msgspec.json.encode(self)
        if len(data) > MAX_ANNOUNCEMENT_BYTES:
            raise ValueError(f"an announcement of {len(data)} bytes is too large")
        return data

    @classmethod
    def decode(cls, data: bytes) -> Announcement:
        """Read a stranger's JSON. Raises BadMessage; call `verify` before believing it."""
        if len(data) > MAX_ANNOUNCEMENT_BYTES:
            raise BadMessage(f"an announcement of {len(data)} bytes is too large")
        try:
            return msgspec.json.decode(data, type=cls)
        except (ValueError, RecursionError) as error:  # msgspec's, and ours from __post_init__
            raise BadMessage(f"not an announcement: {error}") from None


def _check_text(*texts: str, limit: int = MAX_TEXT_CHARS) -> None:
    """Short and printable: these strings end up on people's terminals."""
    for text in texts:
        if len(text) > limit or not text.isprintable():
            raise ValueError("a text is too long or not printable")


def _check_numbers(*numbers: float) -> None:
    for number in numbers:
        exact = not isinstance(number, int) or number <= _MAX_COUNT
        if not (exact and number >= 0 and math.isfinite(number)):
            raise ValueError(f"{str(number)[:40]} is not a count or a quantity")
