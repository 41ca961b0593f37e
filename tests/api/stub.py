"""A backend that says what the test wants, without a mesh; and a tokenizer of one token a byte."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from shoal.api import GenerationRequest, ServedModel
from shoal.engine.request import Sampled, TokenLogprob
from shoal.errors import ModelNotFound
from shoal.models.chat_template import ChatTemplate
from shoal.models.text import Tokenizer
from shoal.units import SessionId

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def byte_tokenizer() -> Tokenizer:
    """Ids 0..255 are the bytes in the order of their letters; `<end>` is 256 and ends a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(models.BPE({x: i for i, x in enumerate(letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<end>"])
    return Tokenizer(inner, eos_ids=(256,), templates={"default": ChatTemplate(TEMPLATE, {})})


TOKENIZER = byte_tokenizer()


class StubGeneration:
    """Says `words`, then ends as a model would: with the end token, or at max_tokens."""

    def __init__(self, backend: StubBackend, request: GenerationRequest) -> None:
        self.session = SessionId("0123456789abcdef")
        self.route = (("amber-fox", "0:4"), ("still-lake", "4:8"))
        self.closed = asyncio.Event()
        self._backend, self._sampling = backend, request.sampling
        self._ids = backend.model.tokenizer.encode(backend.text_for(request))

    async def __aiter__(self) -> AsyncIterator[Sampled]:
        for count, token in enumerate([*self._ids, 256], 1):
            await self._backend.before_token(count)
            if token in self._sampling.stop_ids:
                yield self._sampled(token, "stop")
                return
            finish = "length" if count >= self._sampling.max_tokens else ""
            yield self._sampled(token, finish)
            if finish:
                return

    def _sampled(self, token: int, finish: str) -> Sampled:
        if self._sampling.logprobs < 0:
            return Sampled(token, finish)
        best = [TokenLogprob((token + k) % 256, -0.5 - k) for k in range(self._sampling.logprobs)]
        return Sampled(token, finish, -0.5, tuple(best))

    async def aclose(self) -> None:
        self.closed.set()


class StubBackend:
    """Set the fields to make it answer, wait or fail."""

    def __init__(self) -> None:
        self.text = "Hello, world"
        self.loading = False
        self.refusal: Exception | None = None  # raised by generate
        self.failure: Exception | None = None  # raised before token `fails_at`
        self.fails_at = 1
        self.waits_at = 0  # before this token until `go` is set; 0 = never
        self.go = asyncio.Event()
        self.waiting = asyncio.Event()
        self.requests: list[GenerationRequest] = []
        self.generations: list[StubGeneration] = []
        self.model = ServedModel("shoal-tiny", 1_700_000_000, 64, True, TOKENIZER, "fp_stub")

    def models(self) -> list[ServedModel]:
        return [self.model]

    def find(self, name: str) -> ServedModel:
        if name != self.model.id:
            raise ModelNotFound(f"there is no model {name!r} here", hint="use shoal-tiny")
        return self.model

    async def generate(self, request: GenerationRequest) -> StubGeneration:
        self.requests.append(request)
        if self.refusal is not None:
            raise self.refusal
        self.generations.append(StubGeneration(self, request))
        return self.generations[-1]

    def text_for(self, request: GenerationRequest) -> str:
        return self.text

    async def before_token(self, count: int) -> None:
        if count == self.waits_at:
            self.waiting.set()
            await self.go.wait()
        if self.failure is not None and count == self.fails_at:
            raise self.failure

    def status(self, *, ticket: bool = False) -> dict[str, Any]:
        return {"name": "amber-fox"}

    def mesh(self) -> dict[str, Any]:
        return {"nodes": []}
