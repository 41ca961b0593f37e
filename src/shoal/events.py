"""All that happens in a node, as data. Parts emit events; telemetry/ listens; nobody calls
telemetry.

An event names ids and numbers, never prompt text, keys or addresses of strangers.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from .units import ModelId, NodeId, SessionId, Slice


class NodeSeen(msgspec.Struct, frozen=True, tag=True):
    """A node of our mesh announced itself for the first time."""

    node: NodeId
    name: str


class NodeGone(msgspec.Struct, frozen=True, tag=True):
    """A node said goodbye, or its announcement ran out."""

    node: NodeId
    reason: str


class RelayChanged(msgspec.Struct, frozen=True, tag=True):
    """A Nostr relay came up or went down."""

    url: str
    connected: bool


class ClockSkewed(msgspec.Struct, frozen=True, tag=True):
    """This machine's clock is so many seconds behind (below 0: ahead of) those of the other nodes;
    what we say on the bus is dated by theirs. 0: it is right again.
    """

    offset_s: float


class Leaving(msgspec.Struct, frozen=True, tag=True):
    """We are about to leave the mesh: what runs here still, sessions on our stages and answers of
    our own clients.
    """

    sessions: int
    answers: int


class LinkUp(msgspec.Struct, frozen=True, tag=True):
    node: NodeId


class LinkLost(msgspec.Struct, frozen=True, tag=True):
    node: NodeId
    reason: str


class PeerFault(msgspec.Struct, frozen=True, tag=True):
    """A peer sent what it should not have; `node` is None when it never proved who it is."""

    node: NodeId | None
    code: str
    penalty: int


class StageChanged(msgspec.Struct, frozen=True, tag=True):
    """Our own slice of a model: joining, serving, draining, failed or left."""

    model: ModelId
    layers: Slice
    state: str


class BackendChanged(msgspec.Struct, frozen=True, tag=True):
    """The engine of another make behind our stage: which it is and how it is spoken to; whether it
    answers.
    """

    model: ModelId
    name: str
    answers: bool


class StepDone(msgspec.Struct, frozen=True, tag=True):
    """One ragged forward on this node."""

    model: ModelId
    sequences: int
    tokens: int
    seconds: float


class DraftsVerified(msgspec.Struct, frozen=True, tag=True):
    """One step of our last stage: tokens that were guessed, and how many of them were right."""

    model: ModelId
    drafted: int
    accepted: int


class PagesChanged(msgspec.Struct, frozen=True, tag=True):
    """Fill of the KV cache of one stage, 0..1."""

    model: ModelId
    used: float


class PrefixMatched(msgspec.Struct, frozen=True, tag=True):
    """A session began at one of our stages: of the tokens known, so many were left from earlier."""

    model: ModelId
    asked_tokens: int
    hit_tokens: int


class SessionPreempted(msgspec.Struct, frozen=True, tag=True):
    """An older session needed this one's pages: it is computed again later."""

    model: ModelId


class RequestStarted(msgspec.Struct, frozen=True, tag=True):
    """A session entered at this gateway."""

    session: SessionId
    model_name: str
    prompt_tokens: int


class FirstToken(msgspec.Struct, frozen=True, tag=True):
    session: SessionId
    model_name: str
    seconds: float


class RouteTaken(msgspec.Struct, frozen=True, tag=True):
    """A session got its route. `attempt` counts from 1; earlier ones were refused or lost. `kind`:
    new, queued (pages were short), recomputed (all of it), replayed (around the stages that go on)
    or handed over (from one that leaves).
    """

    session: SessionId
    route: tuple[tuple[NodeId, Slice], ...]
    attempt: int
    kind: str = "new"


class Recovered(msgspec.Struct, frozen=True, tag=True):
    """The first token after a route broke: its stream was silent for `seconds`. `kind` as in
    RouteTaken; `replayed_tokens` were sent again, not computed again.
    """

    session: SessionId
    kind: str
    seconds: float
    replayed_tokens: int


class RequestDone(msgspec.Struct, frozen=True, tag=True):
    """A session ended: `reason` is stop, length, cancelled or an error code."""

    session: SessionId
    model_name: str
    reason: str
    generated_tokens: int
    seconds: float


Event = (
    NodeSeen
    | NodeGone
    | RelayChanged
    | ClockSkewed
    | Leaving
    | LinkUp
    | LinkLost
    | PeerFault
    | StageChanged
    | BackendChanged
    | StepDone
    | DraftsVerified
    | PagesChanged
    | PrefixMatched
    | SessionPreempted
    | RequestStarted
    | FirstToken
    | RouteTaken
    | Recovered
    | RequestDone
)

Emit = Callable[[Event], None]


class EventHub:
    """Hands each event to every listener, in order. A listener must not block."""

    def __init__(self) -> None:
        self._listeners: list[Emit] = []

    def listen(self, listener: Emit) -> None:
        self._listeners.append(listener)

    def emit(self, event: Event) -> None:
        for listener in self._listeners:
            listener(event)


def ignore(event: Event) -> None:
    """An `Emit` for callers that do not care."""
