"""A mesh under noise: many clients that ask, wait and leave at random, and what is left after them.

Two `shoal up` processes with one half each of the built-in model, and a cache so small that pages
run short and sessions are preempted. Clients stream through both nodes: prompts of 1 to 500 tokens,
n, stop strings, JSON, temperatures; a quarter of them leaves, many before the first token. Some
requests have one right answer, which is asked for before the noise and again and again in it.

Afterwards every request must have ended, no page may be held, no process may have grown, and no
known answer may have come out otherwise. The same seed draws the same requests; how they meet is up
to the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from contract import Bench, percentile
from live import Node, nodes
from noise import Ask, Ending, ask, client, known_asks

SLICES = ["0:4", "4:8"]
WARM_UP_S = 60.0  # or half of a shorter run: memory is compared from there on
SETTLE_S = 20.0  # how long pages may take to come back
SHORT_S = 30.0  # a run shorter than this says nothing about memory
MIB = 1 << 20
BAD_LINE = re.compile(r"ERROR|CRITICAL|Traceback|Warning:|raised exception")


@dataclass
class Memory:
    """What a process holds: (seconds since the start, bytes)."""

    process: psutil.Process
    samples: list[tuple[float, float]] = field(default_factory=list)

    def after(self, warm_up_s: float) -> list[tuple[float, float]]:
        return [(at, held) for at, held in self.samples if at >= warm_up_s]

    def ends(self, warm_up_s: float) -> tuple[float, float]:
        """Bytes after the warm-up, and at the end: medians of a tenth of the samples each."""
        held = [held for _, held in self.after(warm_up_s)]
        tenth = max(3, len(held) // 10)
        return statistics.median(held[:tenth]), statistics.median(held[-tenth:])

    def bytes_per_minute(self, warm_up_s: float) -> float:
        at, held = zip(*self.after(warm_up_s), strict=True)
        return 60 * statistics.linear_regression(at, held).slope


@dataclass
class Soak:
    """The run, and what was seen of it."""

    mesh: Sequence[Node]
    seconds: float
    clients: int
    seed: int
    known: dict[str, list[str]] = field(default_factory=dict)
    endings: list[Ending] = field(default_factory=list)
    memories: list[Memory] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)  # of our own timers: how busy the machine is
    took_s: float = 0.0
    held: str = ""  # what is in use after the end

    @property
    def warm_up_s(self) -> float:
        return min(WARM_UP_S, self.seconds / 2)

    async def run(self) -> None:
        apis = [node.api for node in self.mesh]
        await self._learn(apis[0])
        self.memories = [Memory(psutil.Process(node.process.pid)) for node in self.mesh]
        started = time.monotonic()
        chances = [random.Random(f"{self.seed}/{number}") for number in range(self.clients)]
        until = started + self.seconds
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(self._watch())
            clients = [client(each, apis, until, self.endings) for each in chances]
            await asyncio.gather(*clients)
            watching.cancel()
        self.took_s = time.monotonic() - started
        self.held = await self._settle()

    async def _learn(self, api: str) -> None:
        """The known answers, while nobody else asks."""
        async with httpx.AsyncClient(timeout=None) as http:  # noqa: S113
            for name, body in known_asks().items():
                ending = await ask(http, api, Ask(body, known=name))
                if not ending.whole:
                    raise RuntimeError(f"{name}: {ending.how}")
                self.known[name] = _answer(ending)

    async def _watch(self) -> None:
        """Raises RuntimeError, which ends the run, when a node has ended."""
        started, every_s = time.monotonic(), max(0.2, min(2.0, self.seconds / 60))
        while True:
            for node in self.mesh:
                if node.process.poll() is not None:
                    raise RuntimeError(f"a node ended:\n{node.log.read_text()[-8000:]}")
            for memory in self.memories:
                held = float(memory.process.memory_info().rss)
                memory.samples.append((time.monotonic() - started, held))
            due = time.monotonic() + every_s
            await asyncio.sleep(every_s)
            self.late_s.append(time.monotonic() - due)

    async def _settle(self) -> str:
        deadline = time.monotonic() + SETTLE_S
        held = self._in_use()
        while held and time.monotonic() < deadline:
            await asyncio.sleep(0.2)
            held = self._in_use()
        return held

    def _in_use(self) -> str:
        """Sessions and tokens that a node still holds; "" when none. Idle pages are free ones."""
        found = []
        for number, node in enumerate(self.mesh):
            for stage in httpx.get(f"{node.api}/v1/node", timeout=60).json()["stages"]:
                tokens = stage["total_tokens"] - stage["free_tokens"]
                if tokens or stage["sessions"] or stage["pages_used"]:
                    found.append(f"node {number}: {stage['sessions']} sessions, {tokens} tokens")
        return "; ".join(found)

    # ---- what came of it

    def changed(self) -> list[Ending]:
        """Known answers that came out otherwise."""
        return [e for e in self._repeated() if _answer(e) != self.known[e.known]]

    def _repeated(self) -> list[Ending]:
        return [e for e in self.endings if e.known and e.whole]

    def counted(self) -> Counter[str]:
        return Counter(ending.how for ending in self.endings)

    def growth(self, memory: Memory) -> float:
        """Bytes beyond the 5 % and 20 MiB that a process may grow; negative when it did not."""
        before, after = memory.ends(self.warm_up_s)
        return after - (1.05 * before + 20 * MIB)

    def metric(self, name: str) -> float:
        """The sum of a counter over both nodes."""
        texts = [httpx.get(f"{node.api}/metrics", timeout=60).text for node in self.mesh]
        lines = [line for text in texts for line in text.splitlines()]
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name}_total{{"))

    def bad_lines(self) -> list[str]:
        lines = [line for node in self.mesh for line in node.log.read_text().splitlines()]
        return [line for line in lines if BAD_LINE.search(line)]


def _answer(ending: Ending) -> list[str]:
    return [ending.texts.get(index, "") for index in sorted(ending.reasons)]


def report(bench: Bench, soak: Soak) -> None:
    endings = soak.endings
    for how, count in sorted(soak.counted().items()):
        bench.row(what=f"requests: {how}", count=count)
    for what, waits in (
        ("time to first token", [e.first_s for e in endings if e.first_s is not None]),
        ("time between two pieces of text", [gap for e in endings for gap in e.gaps_s]),
        ("this script's own timers came late", soak.late_s),
    ):
        figures = {f"p{percent}_ms": 1e3 * percentile(waits, percent) for percent in (50, 99)}
        bench.row(what=what, count=len(waits), **figures, max_ms=1e3 * max(waits))
    for what, value in _from_metrics(soak).items():
        bench.row(what=what, value=value)
    for number, memory in enumerate(soak.memories):
        before, after = memory.ends(soak.warm_up_s)
        slope = memory.bytes_per_minute(soak.warm_up_s)
        sizes = {"warm_mib": before / MIB, "end_mib": after / MIB, "mib_a_minute": slope / MIB}
        bench.row(what=f"memory of node {number}", **sizes)


def _from_metrics(soak: Soak) -> dict[str, float]:
    def share(part: str, whole: str) -> float:
        return soak.metric(part) / max(1.0, soak.metric(whole))

    drafted = "shoal_spec_decode_num_draft_tokens"
    return {
        "tokens generated a second": soak.metric("shoal_generation_tokens") / soak.took_s,
        "preemptions": soak.metric("shoal_num_preemptions"),
        "prefix cache hit rate": share("shoal_prefix_cache_hits", "shoal_prefix_cache_queries"),
        "drafted tokens": soak.metric(drafted),
        "of these accepted": share("shoal_spec_decode_num_accepted_tokens", drafted),
    }


def judge(bench: Bench, soak: Soak) -> None:
    counted = soak.counted()
    for name, got in {
        "requests that hang": counted["hangs"],
        "answers that broke off": sum(n for how, n in counted.items() if how.startswith("broken")),
        "errors but for a full queue": sum(
            n
            for how, n in counted.items()
            if how.startswith(("refused", "error")) and not how.endswith("overloaded")
        ),
        "nodes that hold pages or sessions after the end": len(soak.held.split("; "))
        if soak.held
        else 0,
        "known answers that came out otherwise": len(soak.changed()),
        "error lines in the logs": len(soak.bad_lines()),
    }.items():
        bench.aim(name, "0", got=got, holds=got == 0)
    repeated = len(soak._repeated())
    bench.aim("known answers repeated", ">= 5", got=repeated, holds=repeated >= 5)
    preempted = soak.metric("shoal_num_preemptions")
    bench.aim("preemptions", ">= 1", got=preempted, holds=preempted >= 1)
    if soak.seconds >= SHORT_S:
        growth = max(map(soak.growth, soak.memories)) / MIB
        bench.aim("MiB grown beyond 5 % + 20 MiB", "<= 0", got=growth, holds=growth <= 0)


def wrongs(soak: Soak) -> Iterator[str]:
    """Whatever is wrong, in words."""
    if soak.held:
        yield f"still held: {soak.held}"
    yield from (f"log: {line}" for line in soak.bad_lines()[:20])
    for each in soak.changed()[:5]:
        yield f"{each.known}: {_answer(each)!r} instead of {soak.known[each.known]!r}"


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, help="300, or 40 with --quick")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--kv-tokens", type=int, default=2048, help="of each node")
    parser.add_argument("--quant", default="auto", help="as `shoal up` has it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="logs of the nodes go there")
    return parser


def main() -> None:
    bench = Bench("soak", __doc__, parser=options())
    told: Any = bench.options
    seconds = told.seconds or (40.0 if bench.quick else 300.0)
    up = ("--kv-tokens", str(told.kv_tokens), "--quant", told.quant, "--verbose")
    with tempfile.TemporaryDirectory() as temporary:
        folder = told.keep or Path(temporary)
        with nodes(folder, "shoal-tiny", SLICES, *up) as mesh:
            soak = Soak(mesh, seconds, told.clients, told.seed)
            asyncio.run(soak.run())
            report(bench, soak)
            judge(bench, soak)
            wrong = list(wrongs(soak))
    bench.finish()
    print("\n".join(wrong))


if __name__ == "__main__":
    main()
