"""Answers one request: opens its generations, gathers or streams what they say, closes them.

Whatever happens, each generation is closed, and the client gets a whole answer or one explicit
error: as a plain response while nothing was sent, else as the last event of the stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from starlette.types import Receive, Scope, Send

from ..errors import ShoalError, StageLost
from ..models.text import Tokenizer
from .backend import Backend, Generation, GenerationRequest
from .choice import ChoiceText
from .delivery import Delivery, StreamDelivery, WholeDelivery
from .presence import ClientLeft, Presence
from .shapes import Shape, Usage
from .tools import Tools


@dataclass(frozen=True, slots=True)
class Job:
    """A request, understood. One sequence for each choice, in the order of their index."""

    requests: tuple[GenerationRequest, ...]
    tokenizer: Tokenizer
    stops: tuple[str, ...]
    prompt_tokens: int  # each prompt once, however many choices it has
    shape: Shape
    stream: bool
    include_usage: bool
    continues: bool = False  # the answers go on from their prompts' text
    tools: Tools | None = None  # whose calls are to be found in the answers


class Answerer:
    def __init__(self, backend: Backend, presence: Presence, heartbeat_s: float) -> None:
        self._backend = backend
        self._presence = presence
        self._heartbeat_s = heartbeat_s

    async def answer(self, job: Job, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises a ShoalError only while nothing was sent. Returns silently if the client left."""
        texts = _texts(job)
        delivery = self._delivery(job, scope, receive, send)
        try:
            async with asyncio.TaskGroup() as group:
                watcher = self._presence.watch(group, receive)
                async with self._opened(job) as generations:
                    await _each(
                        len(texts),
                        lambda index: _follow(index, generations[index], texts[index], delivery),
                    )
                self._presence.release(watcher)
        except BaseExceptionGroup as group_error:
            await _report(_cause(group_error), delivery)
        else:
            await delivery.finish(Usage.of(job.prompt_tokens, sum(text.tokens for text in texts)))
        finally:
            delivery.drop()

    def _delivery(self, job: Job, scope: Scope, receive: Receive, send: Send) -> Delivery:
        if not job.stream:
            return WholeDelivery(job.shape, len(job.requests), scope, receive, send)
        return StreamDelivery(
            job.shape,
            len(job.requests),
            send,
            include_usage=job.include_usage,
            heartbeat_s=self._heartbeat_s,
        )

    @asynccontextmanager
    async def _opened(self, job: Job) -> AsyncIterator[dict[int, Generation]]:
        """All generations by index, opened side by side. None outlives the block."""
        generations: dict[int, Generation] = {}

        async def open_one(index: int) -> None:
            generations[index] = await self._backend.generate(job.requests[index])

        try:
            await _each(len(job.requests), open_one)
            yield generations
        finally:
            for generation in generations.values():
                await generation.aclose()


def _texts(job: Job) -> list[ChoiceText]:
    return [
        ChoiceText(
            job.tokenizer,
            job.stops,
            request.prompt_ids if job.continues else (),
            calls=job.tools.reader() if job.tools else None,
            markers=job.tools.markers if job.tools else None,
        )
        for request in job.requests
    ]


async def _follow(index: int, generation: Generation, text: ChoiceText, delivery: Delivery) -> None:
    """Pass on what one generation says, up to its end or to a stop string."""
    tokens = aiter(generation)
    try:
        async for sampled in tokens:
            piece = text.push(sampled)
            if piece.finish and not sampled.finish:
                await generation.aclose()  # a stop string: the engine does not know of it
            await delivery.take(index, piece)
            if piece.finish:
                return
    finally:
        if isinstance(tokens, AsyncGenerator):
            await tokens.aclose()
    raise StageLost("the generation ended without saying why")


async def _each(count: int, run: Callable[[int], Coroutine[None, None, None]]) -> None:
    """Run for 0..count-1, side by side; the first failure cancels the others."""
    if count == 1:
        await run(0)
        return
    async with asyncio.TaskGroup() as group:
        for index in range(count):
            group.create_task(run(index))


async def _report(cause: BaseException, delivery: Delivery) -> None:
    """Tell the client, if it is still there. A bug of ours is raised on, to be logged."""
    if isinstance(cause, ClientLeft):
        return
    if isinstance(cause, ShoalError):
        await delivery.fail(cause)
        return
    with suppress(ShoalError):
        await delivery.fail(ShoalError("internal error"))
    raise cause


def _cause(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What to act on: a bug of ours first, then the client's leaving, then an orderly error."""
    return min(_leaves(group), key=_rank)


def _rank(error: BaseException) -> int:
    return 2 if isinstance(error, ShoalError) else 1 if isinstance(error, ClientLeft) else 0


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
