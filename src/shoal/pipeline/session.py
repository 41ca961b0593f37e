"""A stage's nouns: a session, and the instructions that its sessions give to whoever runs them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ..engine.rows import Row
from ..events import PrefixMatched, SessionPreempted
from ..units import NodeId, SessionId
from .drafting import Drafting, fits_draft
from .messages import (
    Leaving,
    Lost,
    Open,
    Opened,
    Preempted,
    Refused,
    RowEntry,
    Step,
    TokenEntry,
    Tokens,
)

if TYPE_CHECKING:
    from ..engine.sampling import SamplerState


@dataclass(frozen=True, slots=True)
class Connect:
    """Make sure there is a link to `node`, then call `connected` or `unreachable`."""

    session: SessionId
    node: NodeId


@dataclass(frozen=True, slots=True)
class Send:
    node: NodeId
    message: Opened | Refused | Lost | Leaving | Preempted | Tokens


@dataclass(frozen=True, slots=True)
class Forward:
    """Send the hidden states of these rows (indices into the step) to the next hop, if there is one
    that wants them, and hand them to `keep`. Prompts are `bulk`: nobody who generates waits for
    them on the way.
    """

    node: NodeId | None
    message: Step
    rows: tuple[int, ...]
    bulk: bool = False


@dataclass(frozen=True, slots=True)
class Replay:
    """Send these hidden states, which were kept; call `replay_on` when they are on their way."""

    session: SessionId
    node: NodeId
    message: Step
    hidden: bytes


@dataclass(frozen=True, slots=True)
class Enqueue:
    row: Row


@dataclass(frozen=True, slots=True)
class Drop:
    """Rows of this session that wait for a forward are not wanted any more."""

    session: SessionId


@dataclass(frozen=True, slots=True)
class Note:
    """Worth counting."""

    event: PrefixMatched | SessionPreempted


Instruction = Connect | Send | Forward | Replay | Enqueue | Drop | Note

# connecting -> waiting (for pages) -> running. Where the route is mended, before it runs again:
# suspended (a neighbour is gone) -> settling (Resume came, a forward has to end) -> rejoining (the
# link to the new next hop is made) -> held (until Go) -> replaying (what the next hop lacks)
State = Literal[
    "connecting", "waiting", "running",
    "suspended", "settling", "rejoining", "held", "replaying",
]  # fmt: skip
QUIET: frozenset[State] = frozenset({"suspended", "settling", "rejoining", "held"})


@dataclass(kw_only=True, frozen=True, slots=True)
class StageSessionsConfig:
    max_sessions: int = 1024
    max_waiting: int = 64  # sessions that queue for pages
    chunk_tokens: int = 256  # prompts are cut at multiples of this, counted from position 0
    draft_positions: int = 32  # guesses and rows of all sessions together; 0 = nobody guesses
    headroom_tokens: int = 64  # pages beyond what a session needs at the moment
    window: int | None = None  # no layer looks further back than so many tokens
    share_prefixes: bool = True  # False where a page alone is not all that a layer remembers
    max_patience_s: float = 120.0
    grace_s: float = 5.0  # for who waits for no more than the end of a forward
    resume_grace_s: float = 30.0  # a session whose route broke waits to be told how to go on
    rewinds: bool = True  # False where a stage cannot go back to an earlier token
    history_bytes: int = 256 << 20  # what was sent on, of all sessions together
    idle_s: float = 600.0  # no row for so long: its gateway, which would have given up, is silent
    gateway_share: float = 1.0  # of sessions and pages, for one node other than ourselves


@dataclass(slots=True, eq=False)
class Session:
    """A place in the ring. `position` counts the tokens whose rows we have accepted, `computed`
    those whose pages are filled; rows in `pending` wait for pages.
    """

    open: Open
    gateway: NodeId
    ids: Sequence[int]  # what the gateway gave us: prompt, then output so far; () once running
    digests: Sequence[bytes]  # of the whole pages of the known tokens; of all of them at the end
    deadline: float = 0.0
    touched: float = 0.0  # when it last got on
    state: State = "connecting"
    pages: tuple[int, ...] = ()
    gone: int = 0  # of the first pages, those given back early
    named: int = 0  # of the pages, those that others may find
    position: int = 0
    draft: Sequence[int] = ()  # guesses in the last row accepted: its last positions
    drafting: Drafting | None = None  # where we are the first stage and guess
    computed: int = 0
    begun: bool = False  # its first row is here
    pending: deque[Row] = field(default_factory=deque)
    sampler: SamplerState | None = None
    computing: int = 0  # rows of ours in the running forward
    unkept: int = 0  # rows that were computed and not yet handed to `keep`
    held: deque[tuple[RowEntry, memoryview]] = field(default_factory=deque)  # they came before Go
    send_from: int = 0  # the next hop has all tokens before
    replay_from: int = 0  # of those it lacks, the first that was not sent again
    resumed: bool = False  # on another route than that which its digests name
    closed: bool = False

    @property
    def age(self) -> tuple[int, NodeId, SessionId]:
        """The lower, the older: the same order at every stage."""
        return self.open.born, self.gateway, self.open.session

    @property
    def quiet(self) -> bool:
        """It waits for its gateway to say how to go on."""
        return self.state in QUIET

    @property
    def sure(self) -> int:
        """Positions that will not be written again."""
        return self.position - len(self.draft)

    def misplaced(self, entry: RowEntry, vocab_size: int) -> str:
        """Why this row cannot be the next one, or ""."""
        if not self.sure <= entry.start <= self.position:
            return f"expected position {self.position}, got {entry.start}"
        if entry.start + entry.count > self.open.reserve_tokens:
            return f"it outgrew the {self.open.reserve_tokens} tokens it reserved"
        if entry.draft and not self.samples_at(entry.start + 1):
            return "a guess in the middle of what is known"
        if entry.draft and max(entry.draft) >= vocab_size:
            return f"token id {max(entry.draft)} is outside the vocabulary of {vocab_size}"
        return ""

    def unexpected(self, entry: TokenEntry, vocab_size: int) -> str:
        """Why these cannot be the tokens that follow our last row, or ""."""
        strange = [each.token for each in entry.tokens if each.token >= vocab_size]
        if strange:
            return f"token id {strange[0]} is outside the vocabulary of {vocab_size}"
        if self.sure - self.prompt_tokens != entry.index:
            return f"token {entry.index} came out of turn"
        if not fits_draft(entry.foretold, self.draft):
            return f"token {entry.index} is not what was guessed"
        return ""

    @property
    def prompt_tokens(self) -> int:
        return self.open.known_tokens - self.open.output_tokens

    def samples_at(self, stop: int) -> bool:
        return stop >= self.open.known_tokens
