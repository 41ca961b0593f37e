"""What a gateway deals in: requests, routes and the wish for one, and the instructions that a
generation gives to whoever runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..engine.prefix import PAGE_TOKENS
from ..engine.request import Sampled, Sampling
from ..errors import ShoalError
from ..units import ModelId, NodeId, Slice
from .messages import Close, Go, Open, Resume
from .reunion import ReunionConfig

ANY_TOKEN = 1 << 32  # the bound of token ids where the gateway does not know the vocabulary


@dataclass(frozen=True, slots=True)
class Stop:
    """One station of a route."""

    node: NodeId
    layers: Slice


@dataclass(frozen=True, slots=True)
class Plan:
    """Where a model is computed: the stations of a route in the order of their layers."""

    model: ModelId
    compute: str
    stops: tuple[Stop, ...]
    vocab_size: int = ANY_TOKEN  # token ids are below it


@dataclass(frozen=True, slots=True)
class Wish:
    """The route that a gateway asks for. `keep` are stations of a route that broke and that go on,
    in order: wanted are only the layers between them. `compute` is the class in which the session
    began: an exact one must not change.
    """

    model_name: str
    need_tokens: int  # the longest the session can become
    prompt_ids: Sequence[int] = ()
    avoid: frozenset[NodeId] = frozenset()
    keep: tuple[Stop, ...] = ()
    compute: str | None = None


Planner = Callable[[Wish], Plan]  # raises NoRoute; with `keep`, the whole route, these unchanged


@dataclass(frozen=True, slots=True)
class Request:
    """What a client wants: already tokenised, already checked against the model's context."""

    model_name: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Tell:
    """Send `message` to `node`, `digests` and `ids` in its body."""

    node: NodeId
    message: Open | Resume | Go | Close
    ids: tuple[int, ...] = ()
    digests: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class FindRoute:
    """Ask for a route, by one wish after the other; call `route` with the first that there is, or
    `no_route` when there is none. Where the session goes on anyway, nothing is called then.
    """

    wishes: tuple[Wish, ...]
    needed: bool = True


@dataclass(frozen=True, slots=True)
class Deliver:
    sampled: Sampled


@dataclass(frozen=True, slots=True)
class Finish:
    """The generation is over: `error` is None after a whole answer."""

    reason: str
    error: ShoalError | None = None


Instruction = Tell | FindRoute | Deliver | Finish


@dataclass(kw_only=True, frozen=True, slots=True)
class GenerationConfig:
    max_attempts: int = 6
    queue_patience_s: float = 60.0  # how long a session may queue for pages at one stage
    reunion: ReunionConfig = ReunionConfig()  # how long to look for a route after one broke
    answer_timeout_s: float = 10.0  # a stage that does not answer an Open is taken for lost
    page_tokens: int = PAGE_TOKENS  # pages that stages may share are of this size
    max_preemptions: int = 16  # between two tokens: then it is the stage's doing
    stall_s: float = 10.0  # a session that gets no token for so long has stalled,
    stall_paces: float = 20.0  # or for so many times what a token usually takes it
    prompt_patience_s: float = 0.25  # for a token of a prompt: slow nodes need time
    stall_timeout_s: float = 120.0  # and in any case after so long
    replay: bool = True  # stages that go on keep what they have computed
