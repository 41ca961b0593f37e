"""What guessing tokens ahead is worth: tokens a pass and tokens/s, with n-gram drafts and without.

The built-in model, cut into three stages in one process, over links with a delay (20 ms one way by
default, as between towns). Two texts that it writes itself: greedily it repeats itself, as answers
do that quote or rewrite; drawn with temperature it hardly does, and nothing can be guessed. Both
meshes are up during the whole run and take turns. The same again without any delay tells what the
guesses cost the processor.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from contract import Bench

from shoal.engine.request import Sampling
from shoal.engine.thread import EngineThread
from shoal.events import DraftsVerified, Event, StepDone
from shoal.identity import Identity
from shoal.models.checkpoint import BUILTIN, Checkpoint, open_checkpoint
from shoal.models.text import Tokenizer
from shoal.pipeline import Pipeline, Plan, Request, Serving, ServingConfig, Stop
from shoal.pipeline.loading import compute_class
from shoal.transport import Contact, Links, MemoryConfig, MemoryNetwork
from shoal.units import NodeId, Quant, Slice

FUNCTION = '''def read_lines(path, encoding="utf-8"):
    """Return the lines of a file."""
    with open(path, encoding=encoding) as file:
        lines = file.readlines()
    return [line.rstrip() for line in lines]


'''
REPEATING = "repeats itself", 2 * FUNCTION + "def read_lines(", 0.0
ORDINARY = "ordinary", "import os\n\nclass Reader:\n", 0.8
CUTS = ("0:3", "3:6", "6:8")


@dataclass
class Count:
    """What the last stage did."""

    passes: int = 0
    drafted: int = 0
    accepted: int = 0

    def listen(self, event: Event) -> None:
        match event:
            case StepDone():
                self.passes += 1
            case DraftsVerified(_, drafted, accepted):
                self.drafted += drafted
                self.accepted += accepted


@dataclass
class Mesh:
    """Three nodes, each with links and an engine thread of its own; the first is the gateway."""

    checkpoint: Checkpoint
    draft: str
    delay_s: float
    quant: Quant
    count: Count = field(default_factory=Count)
    stops: list[Stop] = field(default_factory=list)
    pipelines: list[Pipeline] = field(default_factory=list)
    contacts: dict[NodeId, Contact] = field(default_factory=dict)
    compute: str = ""

    async def start(self, stack: AsyncExitStack) -> None:
        network = MemoryNetwork(MemoryConfig(delay_s=self.delay_s))
        for number, cut in enumerate(CUTS):
            await self._add(stack, network, number, Slice.parse(cut))

    async def _add(
        self, stack: AsyncExitStack, network: MemoryNetwork, number: int, layers: Slice
    ) -> None:
        identity = Identity.from_secret(bytes([number + 1]) * 32)
        links = Links(identity, [network.carrier(identity)], resolve=self.contacts.get)
        emit = self.count.listen if number == len(CUTS) - 1 else lambda event: None
        pipeline = Pipeline(links, self._plan, emit=emit, clock=time.monotonic)
        thread = await stack.enter_async_context(EngineThread(1))
        await stack.enter_async_context(pipeline)
        await stack.enter_async_context(links)
        config = ServingConfig(
            memory_bytes=1 << 28, kv_tokens=4096, quant=self.quant, draft=self.draft
        )
        serving = Serving(
            identity.node,
            pipeline,
            links,
            thread,
            config,
            emit=emit,
            clock=time.monotonic,
            changed=lambda: None,
        )
        contact = Contact(identity.node, identity.transport_key, links.addresses)
        self.contacts[identity.node] = contact
        await serving.serve(self.checkpoint, layers, 0.001, pinned=True)
        self.compute = compute_class(self.checkpoint, config)
        self.stops.append(Stop(identity.node, layers))
        self.pipelines.append(pipeline)

    def _plan(self, model: str, need: int, avoid: frozenset[NodeId]) -> Plan:
        return Plan(self.checkpoint.model_id, self.compute, tuple(self.stops))

    async def generate(self, prompt: list[int], tokens: int, temperature: float) -> list[float]:
        """When each token came, in seconds."""
        sampling = Sampling(temperature=temperature, max_tokens=tokens, seed=5)
        stream = self.pipelines[0].gateway.generate(Request(BUILTIN, tuple(prompt), sampling))
        return [time.perf_counter() async for _ in stream]


@dataclass
class Seen:
    tokens_per_s: list[float] = field(default_factory=list)
    tokens: int = 0
    passes: int = 0


async def measure(bench: Bench, delay_s: float, rounds: int, tokens: int) -> None:
    checkpoint = open_checkpoint(BUILTIN)
    tokenizer = Tokenizer.open(checkpoint.folder)
    async with AsyncExitStack() as stack:
        meshes = {
            draft: Mesh(checkpoint, draft, delay_s, bench.options.quant)
            for draft in ("none", "ngram")
        }
        for mesh in meshes.values():
            await mesh.start(stack)
            await mesh.generate([1, 2, 3], 8, 0.0)  # kernels are compiled, links are dialled
        for name, text, temperature in (REPEATING, ORDINARY):
            seen = {draft: Seen() for draft in meshes}
            for _ in range(rounds):
                for draft, mesh in meshes.items():
                    mesh.count.passes = 0
                    came = await mesh.generate(tokenizer.encode(text), tokens, temperature)
                    seen[draft].tokens_per_s.append((len(came) - 1) / (came[-1] - came[0]))
                    seen[draft].tokens += len(came)
                    seen[draft].passes += mesh.count.passes
            report(bench, f"{name}, {1e3 * delay_s:.0f} ms a link", seen, delayed=delay_s > 0)


def report(bench: Bench, what: str, seen: dict[str, Seen], *, delayed: bool) -> None:
    plain = seen["none"].tokens_per_s
    ratios = {}
    for draft, each in seen.items():
        pairs = zip(each.tokens_per_s, plain, strict=True)
        ratios[draft] = statistics.median(own / other for own, other in pairs)
        bench.row(
            what=f"{what}, draft {draft}",
            tokens_a_pass=each.tokens / each.passes,
            tokens_per_s=statistics.median(each.tokens_per_s),
            slowest=min(each.tokens_per_s),
            ratio=ratios[draft],
        )
    if delayed:
        least = 1.5 if what.startswith(REPEATING[0]) else 0.97
        got = ratios["ngram"]
        bench.aim(f"{what}: with / without drafts", f">= {least}", got=got, holds=got >= least)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--delay-ms", type=float, default=20.0, help="one way, of every link")
    parser.add_argument("--quant", default="int8", choices=["none", "int8", "int4"])
    bench = Bench("speculation", __doc__, parser=parser)
    rounds, tokens = (2, 96) if bench.quick else (5, 192)
    for delay_ms in (bench.options.delay_ms, 0.0):
        asyncio.run(measure(bench, delay_ms / 1e3, rounds, tokens))
    bench.finish()


if __name__ == "__main__":
    main()
