"""From the bytes of an answer to the tokens that the mesh is told. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from ...errors import BackendFailed, InvalidRequest, UnsupportedModel
from ..request import Ending, Sampled
from .dialect import Job, Json, Reader

MAX_EVENT_BYTES = 1 << 20
UNREADABLE = (
    AttributeError,
    IndexError,
    InvalidRequest,  # text with half a character
    KeyError,
    TypeError,
    UnsupportedModel,  # text that the vocabulary cannot spell
    ValueError,
)


class EventLines:
    """Server-sent events out of bytes that are cut anywhere. Comments and OpenAI's `[DONE]` are
    passed over.
    """

    def __init__(self) -> None:
        self._rest = b""

    def receive(self, data: bytes) -> list[dict[str, Any]]:
        """Raises BackendFailed for what is no event, or a longer one than anybody sends."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if max(map(len, (*lines, self._rest))) > MAX_EVENT_BYTES:
            raise BackendFailed(f"the engine sent an event of more than {MAX_EVENT_BYTES} bytes")
        return [event for line in lines if (event := _event(line.strip())) is not None]


def _event(line: bytes) -> dict[str, Any] | None:
    field, _, value = line.partition(b":")
    value = value.strip()
    if field not in (b"data", b"error") or value == b"[DONE]":
        return None
    try:
        event = msgspec.json.decode(value, type=dict[str, Any])
    except (ValueError, RecursionError):
        raise BackendFailed("the engine sent an event that is no JSON object") from None
    return {"error": event} if field == b"error" and "error" not in event else event


class Answer:
    """Ends at a stop id, at `max_tokens`, or where the engine does; in each case with a token that
    says so, which is `end_id` where the engine told none.
    """

    def __init__(self, job: Job, reader: Reader, end_id: int) -> None:
        self._stops, self._room = frozenset(job.sampling.stop_ids), job.room
        self._alternatives = job.sampling.logprobs
        self._reader, self._end_id = reader, end_id
        self.over = False

    def take(self, event: Json) -> list[Sampled]:
        """Raises BackendFailed for an event that is no answer."""
        try:
            piece = self._reader.read(event)
        except UNREADABLE as error:
            raise BackendFailed(f"the engine's answer cannot be read: {error!r}") from None
        out = list(self._told(piece.tokens))
        if piece.finish and not self.over:
            self.over = True
            out.append(Sampled(self._end_id, piece.finish))
        return out

    def _told(self, tokens: Iterable[Sampled]) -> Iterator[Sampled]:
        for sampled in tokens:
            if self.over:
                return
            self._room -= 1
            finish: Ending = "stop" if sampled.token in self._stops else ""
            finish = finish or ("length" if self._room <= 0 else "")
            self.over = bool(finish)
            yield self._as_asked(sampled, finish)

    def _as_asked(self, sampled: Sampled, finish: Ending) -> Sampled:
        if self._alternatives < 0:
            return Sampled(sampled.token, finish)
        top = sampled.top[: self._alternatives]
        return Sampled(sampled.token, finish, sampled.logprob, top)
