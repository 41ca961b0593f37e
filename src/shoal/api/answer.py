"""Answers one request: opens its generations, gathers or streams what they say, closes them.

Whatever happens, each generation is closed, and the client gets a whole answer or one explicit
error: as a plain response while nothing was sent, else as the last event of the stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..errors import ShoalError, StageLost
from ..models.text import Tokenizer
from .backend import Backend, Generation, GenerationRequest
from .choice import ChoiceText, Piece
from .failures import body_of
from .presence import ClientLeft, Presence
from .shapes import DONE, Result, Shape, Usage
from .stream import EventStream


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


class Answerer:
    def __init__(self, backend: Backend, presence: Presence, heartbeat_s: float) -> None:
        self._backend = backend
        self._presence = presence
        self._heartbeat_s = heartbeat_s

    async def answer(self, job: Job, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises a ShoalError only while nothing was sent. Returns silently if the client left."""
        events = EventStream(send)
        try:
            async with asyncio.TaskGroup() as group:
                watcher = self._presence.watch(group, receive)
                if job.stream:
                    await self._stream(job, events)
                else:
                    body = await self._whole(job)
                    await Response(body, media_type="application/json")(scope, receive, send)
                self._presence.release(watcher)
        except BaseExceptionGroup as group_error:
            await _report(_cause(group_error), events)

    async def _whole(self, job: Job) -> bytes:
        texts = _texts(job)
        results: dict[int, Result] = {}
        async with self._opened(job.requests) as generations:

            async def gather(index: int) -> None:
                pieces = [piece async for piece in _pieces(generations[index], texts[index])]
                results[index] = Result(
                    "".join(piece.text for piece in pieces),
                    tuple(placed for piece in pieces for placed in piece.tokens),
                    pieces[-1].finish,
                )

            await _each(len(texts), gather)
        return job.shape.whole([results[index] for index in range(len(texts))], _usage(job, texts))

    async def _stream(self, job: Job, events: EventStream) -> None:
        shape, texts = job.shape, _texts(job)
        heart = asyncio.ensure_future(events.keep_alive(self._heartbeat_s))
        try:
            async with self._opened(job.requests) as generations:

                async def pass_on(index: int) -> None:
                    opening = shape.opening(index)
                    async for piece in _pieces(generations[index], texts[index]):
                        data = opening + shape.piece(index, piece)
                        if piece.finish:
                            data += shape.closing(index, piece.finish)
                        if data:
                            await events.write(data)
                            opening = b""

                await _each(len(texts), pass_on)
        finally:
            heart.cancel()
        end = shape.usage(_usage(job, texts)) if job.include_usage else b""
        await events.write(end + DONE, last=True)

    @asynccontextmanager
    async def _opened(
        self, requests: Sequence[GenerationRequest]
    ) -> AsyncIterator[dict[int, Generation]]:
        """All generations by index, opened side by side. None outlives the block."""
        generations: dict[int, Generation] = {}

        async def open_one(index: int) -> None:
            generations[index] = await self._backend.generate(requests[index])

        try:
            await _each(len(requests), open_one)
            yield generations
        finally:
            for generation in generations.values():
                await generation.aclose()


def _texts(job: Job) -> list[ChoiceText]:
    return [
        ChoiceText(job.tokenizer, job.stops, request.prompt_ids if job.continues else ())
        for request in job.requests
    ]


def _usage(job: Job, texts: Sequence[ChoiceText]) -> Usage:
    return Usage.of(job.prompt_tokens, sum(text.tokens for text in texts))


async def _pieces(generation: Generation, text: ChoiceText) -> AsyncIterator[Piece]:
    """The pieces of one choice; the last one, and only that, has a `finish`."""
    async for sampled in generation:
        piece = text.push(sampled)
        yield piece
        if piece.finish:
            if not sampled.finish:  # a stop string: the engine does not know that this is the end
                await generation.aclose()
            return
    raise StageLost("the generation ended without saying why")


async def _each(count: int, run: Callable[[int], Coroutine[None, None, None]]) -> None:
    """Run for 0..count-1, side by side; the first failure cancels the others."""
    if count == 1:
        await run(0)
        return
    async with asyncio.TaskGroup() as group:
        for index in range(count):
            group.create_task(run(index))


async def _report(cause: BaseException, events: EventStream) -> None:
    """Tell the client, if it is still there and has not heard the end yet."""
    if isinstance(cause, ClientLeft):
        return
    if not events.started:
        raise cause
    error = cause if isinstance(cause, ShoalError) else ShoalError("internal error")
    if not events.ended:
        await events.write(b"data: " + body_of(error) + b"\n\n", last=True)
    if error is not cause:
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
