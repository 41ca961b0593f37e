"""What the front door needs from the rest of the house; `node/backend.py` is it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..engine.request import Sampled, Sampling
from ..units import SessionId

if TYPE_CHECKING:
    from ..models.text import Tokenizer


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that somebody in the mesh holds layers of."""

    id: str  # the public name, such as "shoal-tiny"
    created: int  # unix seconds
    context_length: int  # tokens, prompt and answer together
    ready: bool  # a complete route exists now
    tokenizer: Tokenizer | None
    fingerprint: str  # reported as system_fingerprint


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to generate, already in token ids."""

    model: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling


class Generation(Protocol):
    """One running session. Iterating gives its tokens; raises StageLost and others midway."""

    session: SessionId

    @property
    def route(self) -> tuple[tuple[str, str], ...]:
        """(node name, "a:b") in the order of the layers; another one after a recovery."""
        ...

    def __aiter__(self) -> AsyncIterator[Sampled]: ...

    async def aclose(self) -> None:
        """Cancel if it still runs: frees its pages on every stage. A second call does nothing."""
        ...


class Backend(Protocol):
    """The mesh as a gateway sees it."""

    @property
    def loading(self) -> bool:
        """True until this node can take requests."""
        ...

    def models(self) -> list[ServedModel]: ...

    def find(self, name: str) -> ServedModel:
        """Raises ModelNotFound that lists what there is."""
        ...

    async def generate(self, request: GenerationRequest) -> Generation:
        """Open a session. Raises NoRoute, Overloaded, NoCapacity or PromptTooLong."""
        ...

    def status(self, *, ticket: bool = False) -> dict[str, Any]:
        """This node, ready for JSON; an invitation to its mesh only when asked for."""
        ...

    def mesh(self) -> dict[str, Any]:
        """The nodes of the mesh as this node sees them, ready for JSON."""
        ...
