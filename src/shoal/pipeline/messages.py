"""All that nodes say to each other about sessions: one frozen union, one screen, all of it bounded.

Token ids travel in the frame's body as little-endian u32, hidden states as raw tensor bytes; the
header stays small. A session id is drawn anew for every route that is tried, so a message of an
abandoned route can never be mistaken.
"""

from __future__ import annotations

import array
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import msgspec

from ..engine.draft import MAX_DRAFT
from ..engine.prefix import DIGEST_BYTES, PAGE_TOKENS
from ..engine.request import Sampled, Sampling, TokenId
from ..errors import BadMessage
from ..transport import Bytes, Frame
from ..units import ModelId, NodeId, SessionId, Slice

CHANNEL = 1  # of the transport's frames
MAX_ROWS = 4096  # sequences in one step: more than any stage will ever batch
MAX_TOKENS_IN_FRAME = 128  # with twenty alternatives each they fill most of a header
MAX_ROW_TOKENS = 512  # of one session in one step: prompts are cut at 256
MAX_TOKENS = 1 << 31
MAX_DIGESTS = 1 << 16  # of one session's pages
MAX_TEXT_CHARS = 300

# What a stranger's names and numbers may be. Ids have one length, or a frame that carries many of
# them could outgrow its header on the way through an honest node.
_Session = Annotated[SessionId, msgspec.Meta(pattern=r"\A[0-9a-f]{16}\Z")]
_Node = Annotated[NodeId, msgspec.Meta(pattern=r"\Anpub1[a-z0-9]{58}\Z")]
_Model = Annotated[ModelId, msgspec.Meta(max_length=64)]
_Compute = Annotated[str, msgspec.Meta(max_length=8)]
_Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT_CHARS)]
_Tokens = Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)]


class Open(msgspec.Struct, frozen=True, tag=True):
    """Gateway -> stage, once a session: all this stage has to know. Body: digests of the whole
    pages of the known tokens but for the last token; then prompt ids, then output ids.

    Only the first stage is given the ids, and the last one where a repetition penalty needs them.
    `known_tokens` = prompt + output so far: the row that reaches it is the first to be sampled.
    Where pages with these digests are left from an earlier session, they need not be computed
    again.
    """

    session: _Session
    model: _Model
    compute: _Compute
    layers: Slice
    previous: _Node  # who sends us rows; for the first stage the last one, which sends tokens
    next: _Node  # whom we send rows; for the last stage the first one
    known_tokens: _Tokens
    reserve_tokens: _Tokens  # the longest this session can become
    output_tokens: _Tokens = 0  # of the known tokens, those generated on an earlier route
    sampling: Sampling | None = None  # last stage only
    patience_s: float = 0.0  # how long to queue for pages; 0 = answer at once
    born: Annotated[int, msgspec.Meta(ge=0, lt=1 << 60)] = 0  # age of the request: microseconds
    page_tokens: Annotated[int, msgspec.Meta(ge=1, le=4096)] = (
        PAGE_TOKENS  # that a digest stands for
    )
    digests: _Tokens = 0  # how many
    prefix_tokens: _Tokens = 0  # so many tokens at most may be left uncomputed
    hold: bool = False  # once opened, it begins with Go

    def __post_init__(self) -> None:
        if not (math.isfinite(self.patience_s) and self.patience_s >= 0):
            raise ValueError("patience is a time")
        if not max(1, self.output_tokens) <= self.known_tokens <= self.reserve_tokens:
            raise ValueError("output_tokens are among known_tokens, and these among reserve_tokens")
        if self.digests and self.digests * self.page_tokens >= self.known_tokens:
            raise ValueError("the last known token is always computed")


class Load(msgspec.Struct, frozen=True, array_like=True):
    """How busy a stage is: sessions that run, sessions that wait, tokens that it has pages for."""

    sessions: _Tokens = 0
    queue: _Tokens = 0
    free_tokens: _Tokens = 0


class Opened(msgspec.Struct, frozen=True, tag=True):
    """Stage -> gateway: the session is here, and with it so many tokens of its prefix, in whole
    pages; after a Resume any number, and what it sent on of those from `kept_from` on is kept.
    """

    session: _Session
    prefix_tokens: _Tokens = 0
    kept_from: _Tokens = 0
    load: Load | None = None


class Refused(msgspec.Struct, frozen=True, tag=True):
    """Stage -> gateway: busy (try later), never (would not fit an empty stage), gone (no such stage
    here), unreachable (next hop), invalid (no answer can be what the request asks for).
    """

    session: _Session
    reason: Literal["busy", "never", "gone", "unreachable", "invalid"]
    message: _Text


class RowEntry(msgspec.Struct, frozen=True, array_like=True):
    """`count` positions of one session, from position `start`. All but the first may be a `draft`:
    guesses that the last stage checks. The next row writes over those that were wrong.
    """

    session: _Session
    start: _Tokens
    count: Annotated[int, msgspec.Meta(ge=1, le=MAX_ROW_TOKENS)]
    draft: Annotated[tuple[TokenId, ...], msgspec.Meta(max_length=MAX_DRAFT)] = ()

    def __post_init__(self) -> None:
        if self.draft and self.count != 1 + len(self.draft):
            raise ValueError("a draft follows one token")


class Step(msgspec.Struct, frozen=True, tag=True):
    """Stage -> next stage: all that one forward made for it. Body: hidden states (sum of counts,
    width), row-major.
    """

    rows: Annotated[tuple[RowEntry, ...], msgspec.Meta(min_length=1, max_length=MAX_ROWS)]


class TokenEntry(msgspec.Struct, frozen=True, array_like=True):
    """What was chosen after one row: the tokens of its draft that were right, then `sampled`."""

    session: _Session
    index: _Tokens  # position of the first of them in the output, from 0
    sampled: Sampled
    foretold: Annotated[tuple[Sampled, ...], msgspec.Meta(max_length=MAX_DRAFT)] = ()

    @property
    def tokens(self) -> tuple[Sampled, ...]:
        return (*self.foretold, self.sampled)


class Tokens(msgspec.Struct, frozen=True, tag=True):
    """Last stage -> first stage (to go on) and gateway (to stream)."""

    entries: Annotated[tuple[TokenEntry, ...], msgspec.Meta(min_length=1, max_length=MAX_ROWS)]


def tokens_in_frames(entries: Sequence[TokenEntry]) -> Iterator[Tokens]:
    """Mostly one message; several where one could outgrow its header."""
    part: list[TokenEntry] = []
    size = 0
    for entry in entries:
        if part and size + len(entry.tokens) > MAX_TOKENS_IN_FRAME:
            yield Tokens(tuple(part))
            part, size = [], 0
        part.append(entry)
        size += len(entry.tokens)
    if part:
        yield Tokens(tuple(part))


class Close(msgspec.Struct, frozen=True, tag=True):
    """Gateway -> stage: forget the session, free its pages. Body: the digests that follow those of
    its Open, under which its pages may be found again.
    """

    session: _Session


class Preempted(msgspec.Struct, frozen=True, tag=True):
    """Stage -> gateway: an older session needed the pages. Nothing is wrong with this one: open it
    again, and wait.
    """

    session: _Session


class Lost(msgspec.Struct, frozen=True, tag=True):
    """Stage -> gateway: this session cannot go on here. `node` is whom we could not reach, or
    ourselves. What is `kept` waits for a moment for Resume.
    """

    session: _Session
    node: _Node
    message: _Text
    kept: bool = False


class Leaving(msgspec.Struct, frozen=True, tag=True):
    """Stage -> gateway: this session runs, but should go on without us soon."""

    session: _Session


class Resume(msgspec.Struct, frozen=True, tag=True):
    """Gateway -> stage that goes on: the session has a new route, and so a new id. What waits here
    is dropped, what was computed of the known tokens but the last is kept, and answered with
    Opened. Body: token ids, as in Open.
    """

    session: _Session
    renamed: _Session
    known_tokens: _Tokens
    output_tokens: _Tokens
    previous: _Node
    next: _Node

    def __post_init__(self) -> None:
        if not max(1, self.output_tokens) <= self.known_tokens:
            raise ValueError("output_tokens are among known_tokens")
        if self.session == self.renamed:
            raise ValueError("each route is tried under an id of its own")


class Go(msgspec.Struct, frozen=True, tag=True):
    """Gateway -> stage, once all stages of a route that was mended are there. The next stage has
    all tokens before `send_from`: those after it that we sent are sent again. `redo`: we have not
    kept them, and compute everything again.
    """

    session: _Session
    send_from: _Tokens = 0
    redo: bool = False


Message = Open | Opened | Refused | Step | Tokens | Close | Preempted | Lost | Leaving | Resume | Go

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


def to_frame(message: Message, body: Bytes = b"", *, bulk: bool = False) -> Frame:
    return Frame(CHANNEL, _encoder.encode(message), body, bulk)


def from_frame(frame: Frame) -> Message:
    """Raises BadMessage: unknown tags and wrong types are refused before our code sees them."""
    try:
        message: Message = _decoder.decode(frame.header)
    except (ValueError, RecursionError) as error:
        raise BadMessage(f"a pipeline message does not decode: {error}") from None
    return message


def split_open(message: Open, body: Bytes) -> tuple[list[bytes], Sequence[int]]:
    """Digests and token ids. Raises BadMessage."""
    view = memoryview(body).cast("B")
    at = message.digests * DIGEST_BYTES
    if at > len(view):
        raise BadMessage(f"{message.digests} digests do not fit into {len(view)} bytes")
    return unpack_digests(view[:at]), unpack_ids(view[at:])


def unpack_digests(body: Bytes) -> list[bytes]:
    """Raises BadMessage."""
    view = memoryview(body).cast("B")
    if len(view) % DIGEST_BYTES or len(view) > MAX_DIGESTS * DIGEST_BYTES:
        raise BadMessage(f"{len(view)} bytes are not a list of digests")
    return [bytes(view[at : at + DIGEST_BYTES]) for at in range(0, len(view), DIGEST_BYTES)]


def one_line(text: str) -> str:
    """Short and printable: what a node tells another may end up on a terminal."""
    return "".join(filter(str.isprintable, text))[:MAX_TEXT_CHARS]


def pack_ids(ids: Sequence[int]) -> bytes:
    words = array.array("I", ids)
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()


def unpack_ids(body: Bytes) -> Sequence[int]:
    """Kept as they came, 4 bytes each. Raises BadMessage."""
    if len(body) % 4:
        raise BadMessage(f"{len(body)} bytes are not a list of 32-bit token ids")
    words = array.array("I", bytes(body))
    if sys.byteorder == "big":
        words.byteswap()
    return words
