"""One engine behind a URL: found out about, asked for tokens, looked after."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from ...models.text import Tokenizer
from ..request import Sampled, Sampling
from .client import EngineClient
from .dialect import Job
from .probe import SAMPLE, Probed, probe
from .retokenise import Retokeniser

MEASURED_TOKENS = 8


class Engine:
    """`names` are what the model may be called there, or is `exactly`. Ask `probe` first."""

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer,
        names: Sequence[str],
        *,
        exactly: bool = False,
    ) -> None:
        self._client, self._tokenizer = client, tokenizer
        self._names, self._exactly = names, exactly
        self._probed: Probed | None = None

    @property
    def probed(self) -> Probed:
        if self._probed is None:
            raise RuntimeError("the engine was not probed")
        return self._probed

    @property
    def name(self) -> str:
        """Which server it is, and how it is spoken to."""
        return self.probed.dialect.name

    async def probe(self) -> Probed:
        """Raises BackendFailed while it does not answer, BadConfig where waiting will not help."""
        await asyncio.to_thread(Retokeniser(self._tokenizer).prepare)
        self._probed = await probe(
            self._client, self._tokenizer, self._names, exactly=self._exactly
        )
        return self._probed

    async def alive(self) -> None:
        """Raises BackendFailed when it is not."""
        await self._client.ask("v1/models")

    async def token_seconds(self, clock: Callable[[], float]) -> float:
        """Of one token after the first, when nothing else is to be done. Raises BackendFailed."""
        prompt = self._tokenizer.encode(SAMPLE, add_special=False)
        times = []
        job = Job(prompt, (), Sampling(temperature=0.0, max_tokens=MEASURED_TOKENS))
        async with aclosing(self.generate(job)) as pieces:
            async for tokens in pieces:
                times += [clock()] * len(tokens)
        return max(0.0, times[-1] - times[0]) / max(1, len(times) - 1)

    def refuses(self, sampling: Sampling) -> str:
        return self.probed.dialect.refuses(sampling)

    def generate(self, job: Job) -> AsyncGenerator[list[Sampled], None]:
        """Tokens as they come, the last with a `finish`; close it to free the engine's slot. Raises
        BackendFailed.
        """
        eos_ids = self._tokenizer.eos_ids
        end_id = next(iter((*job.sampling.stop_ids, *eos_ids)), 0)
        return self._client.generate(self.probed.dialect, job, end_id)
