"""The mesh as the front door sees it: models to choose from, generations, and what `shoal status`
shows.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

from ..api.backend import Generation, GenerationRequest, ServedModel
from ..api.failures import ShuttingDown
from ..engine.request import Sampled
from ..errors import ModelNotFound, PromptTooLong
from ..identity import friendly_name
from ..pipeline import Gateway, Request, Stream
from ..units import NodeId, SessionId
from .router import Router


class MeshGeneration:
    """One running generation, in the API's terms."""

    def __init__(self, stream: Stream, name_of: Callable[[NodeId], str]) -> None:
        self._stream, self._name_of = stream, name_of
        self.session: SessionId = stream.id

    @property
    def route(self) -> tuple[tuple[str, str], ...]:
        plan = self._stream.plan
        return tuple((self._name_of(s.node), str(s.layers)) for s in plan.stops) if plan else ()

    def __aiter__(self) -> AsyncIterator[Sampled]:
        return self._stream.__aiter__()

    async def aclose(self) -> None:
        await self._stream.aclose()


class MeshBackend:
    """Implements `api.Backend` over the pipeline's gateway."""

    def __init__(
        self,
        router: Router,
        gateway: Gateway,
        *,
        started_at: int,
        is_loading: Callable[[], bool],
        is_leaving: Callable[[], bool],
        status: Callable[[bool], dict[str, Any]],
        mesh: Callable[[], dict[str, Any]],
    ) -> None:
        self._router, self._gateway, self._started_at = router, gateway, started_at
        self._is_loading, self._is_leaving = is_loading, is_leaving
        self._status, self.mesh = status, mesh

    def status(self, *, ticket: bool = False) -> dict[str, Any]:
        return self._status(ticket)

    @property
    def loading(self) -> bool:
        return self._is_loading()

    def models(self) -> list[ServedModel]:
        return [self._served(name) for name in self._router.model_names()]

    def find(self, name: str) -> ServedModel:
        names = self._router.model_names()
        if name not in names:
            known = ", ".join(names) or "none yet"
            raise ModelNotFound(
                f"there is no model {name!r} in this mesh; models: {known}",
                hint=f"shoal up --model {name} on this machine or another",
            )
        return self._served(name)

    def _served(self, name: str) -> ServedModel:
        offer = self._router.best_offer(name)
        return ServedModel(
            id=name,
            created=self._started_at,
            context_length=offer.context_length,
            ready=self._router.is_ready(name),
            tokenizer=self._router.tokenizer(name),
            fingerprint=f"{offer.model}-{offer.compute}",
        )

    async def generate(self, request: GenerationRequest) -> Generation:
        if self._is_leaving():
            raise ShuttingDown("this node is leaving the mesh", hint="ask another node of the mesh")
        limit = self._router.best_offer(request.model).context_length
        wanted = len(request.prompt_ids) + request.sampling.max_tokens
        if wanted > limit:
            raise PromptTooLong(
                f"{len(request.prompt_ids)} tokens of prompt and {request.sampling.max_tokens} "
                f"of answer are more than the {limit} that {request.model} can hold",
                param="max_tokens",
            )
        stream = self._gateway.generate(
            Request(request.model, request.prompt_ids, request.sampling)
        )
        try:
            await stream.opened()
        except BaseException:
            await stream.aclose()
            raise
        return MeshGeneration(stream, friendly_name)
