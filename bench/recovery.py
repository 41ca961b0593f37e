"""What a client sees when a stage dies in the middle of its answer.

A gateway and six stages, each a `shoal up` process: three slices of the built-in model, each held
by two. While an answer is streamed, one of the stages that compute it is killed (SIGKILL) or put to
sleep (SIGSTOP) at a random moment, prompts included; its twin, already loaded, goes on. Then it is
started or woken again, and the next one is hit. The text is compared with the undisturbed one; the
longest pause between two pieces of text is the gap. In the end every page has to be free and no
survivor may have grown.

In the exact class (int8) the text must be the same; in bf16 the rate of differences is reported. A
planned leave (SIGTERM) is measured as well: it should leave no gap at all.
"""

from __future__ import annotations

import json
import random
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import psutil
from contract import Bench, percentile
from live import free_port, start

SLICES = ("0:3", "3:6", "6:8")
TWINS = 2
PATIENCE_S = 120.0
PROMPT_TOKENS, TOKENS = 400, 200
ASLEEP_S = 3.0
KINDS = {"killed": signal.SIGKILL, "asleep": signal.SIGSTOP, "leaving": signal.SIGTERM}


def get(url: str) -> Any:
    with urlopen(url, timeout=30) as answer:  # noqa: S310 - our own node
        return json.load(answer)


def wait_for(what: str, happened: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            if found := happened():
                return found
        except OSError:
            pass  # not listening yet
        time.sleep(0.05)
    raise TimeoutError(f"{what}: not within {PATIENCE_S:.0f} s")


@dataclass
class Member:
    """One process, started again as often as it is killed."""

    home: Path
    port: int
    wanted: Sequence[str]
    relay: bool = False
    process: subprocess.Popen[bytes] | None = None
    api: str = ""

    def start(self) -> None:
        self.process = start(self.home, self.port, self.wanted, relay=self.relay)

    def wait(self) -> None:
        """Until it answers, and serves if it has layers."""

        def told() -> str:
            line, newline, _ = (self.home / "out").read_text().partition("\n")
            return str(json.loads(line)["api"]) if newline else ""

        self.api = wait_for(f"{self.home.name} starts", told)
        if "--layers" in self.wanted:
            wait_for(f"{self.home.name} serves", lambda: self.stage()["state"] == "serving")

    def stage(self) -> dict[str, Any]:
        (found,) = get(f"{self.api}/v1/node")["stages"] or [{"state": "", "sessions": 0}]
        return dict(found)

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            self.process.wait()


@dataclass
class Mesh:
    gateway: Member
    stages: list[Member]

    @property
    def members(self) -> list[Member]:
        return [self.gateway, *self.stages]

    def wait_whole(self) -> None:
        """Every stage serves, and the gateway knows all of them."""
        for member in self.stages:
            wait_for("all serve", lambda member=member: member.stage()["state"] == "serving")

        def known() -> bool:
            nodes = get(f"{self.gateway.api}/v1/mesh")["nodes"]
            serving = [s for node in nodes for s in node["stages"] if s["state"] == "serving"]
            return len(serving) == len(self.stages)

        wait_for("the gateway sees all stages", known)

    def at_work(self) -> list[Member]:
        """The stages that have the one session there is."""
        return [member for member in self.stages if member.stage()["sessions"]]

    def free(self) -> bool:
        return all(m.stage()["sessions"] == 0 for m in self.stages)


@contextmanager
def mesh(folder: Path, *how: str) -> Iterator[Mesh]:
    port = free_port()
    gateway = Member(folder / "gateway", port, ["--no-serve"], relay=True)
    stages = [
        Member(folder / f"stage{n}", port, ["--model", "shoal-tiny", "--layers", layers, *how])
        for n, layers in enumerate(SLICES * TWINS)
    ]
    found = Mesh(gateway, stages)
    try:
        gateway.start()
        gateway.wait()
        for member in stages:
            member.start()
        for member in stages:
            member.wait()
        found.wait_whole()
        yield found
    finally:
        for member in found.members:
            member.end()


@dataclass
class Answer:
    """`came` are the times of its pieces, from the request on."""

    text: str = ""
    came: list[float] = field(default_factory=list)
    error: str = ""

    @property
    def gap_s(self) -> float:
        """The longest wait between two pieces; before the first there is the prompt to compute."""
        return max((b - a for a, b in zip(self.came, self.came[1:], strict=False)), default=0.0)


def stream(api: str, prompt: Sequence[int], on_piece: Callable[[int], None]) -> Answer:
    """`on_piece(n)` is called before the n-th piece is read."""
    body = {
        "model": "shoal-tiny",
        "prompt": list(prompt),
        "max_tokens": TOKENS,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
    }
    kind = {"Content-Type": "application/json"}
    request = Request(f"{api}/v1/completions", json.dumps(body).encode(), kind)  # noqa: S310
    answer, started = Answer(), time.perf_counter()
    try:
        with urlopen(request, timeout=PATIENCE_S) as lines:  # noqa: S310
            on_piece(0)
            for line in lines:
                if not line.startswith(b"data: {"):
                    continue
                said = json.loads(line[6:])
                if "error" in said:
                    answer.error = said["error"]["message"]
                    break
                answer.text += "".join(choice["text"] for choice in said["choices"])
                answer.came.append(time.perf_counter() - started)
                on_piece(len(answer.came))
    except HTTPError as error:
        answer.error = error.read().decode()
    return answer


@dataclass
class Trial:
    kind: str
    slice: str
    at: int  # pieces of text that had come
    same: bool
    gap_s: float
    error: str


def trial(found: Mesh, kind: str, chance: random.Random, prompt: list[int], text: str) -> Trial:
    """One stage of the route is hit after a random piece of text; 0 = while the prompt is read."""
    at = chance.choice([0, *range(1, TOKENS - 20)])
    where = chance.randrange(len(SLICES))
    hit: list[Member] = []

    def strike(piece: int) -> None:
        if piece == at:
            working = wait_for("a stage works", found.at_work) if piece else found.at_work()
            victims = [each for each in working if each.wanted[3] == SLICES[where]]
            for victim in victims[:1]:
                victim.signal(KINDS[kind])
                hit.append(victim)

    answer = stream(found.gateway.api, prompt, strike)
    for victim in hit:
        heal(victim, kind)
    found.wait_whole()
    wait_for("sessions end", found.free)
    same = answer.text == text and not answer.error
    return Trial(kind if hit else "missed", SLICES[where], at, same, answer.gap_s, answer.error)


def heal(victim: Member, kind: str) -> None:
    if kind == "asleep":
        time.sleep(ASLEEP_S)
        victim.signal(signal.SIGCONT)
        return
    assert victim.process is not None
    victim.process.wait()
    victim.start()
    victim.wait()


def memory(members: Sequence[Member]) -> list[int]:
    return [psutil.Process(m.process.pid).memory_info().rss for m in members if m.process]


def measure(bench: Bench, compute: str, trials: int, kinds: Sequence[str]) -> list[Trial]:
    chance = random.Random(f"{compute} {trials}")
    how = ["--quant", "int8"] if compute == "int8" else ["--quant", "none", "--dtype", compute]
    done: list[Trial] = []
    with tempfile.TemporaryDirectory() as folder, mesh(Path(folder), *how) as found:
        prompts = [[chance.randrange(3, 4000) for _ in range(PROMPT_TOKENS)] for _ in range(4)]
        plain = [stream(found.gateway.api, prompt, lambda _: None) for prompt in prompts]
        before = memory([found.gateway])
        while len(done) < trials:
            kind, number = kinds[len(done) % len(kinds)], chance.randrange(len(prompts))
            one = trial(found, kind, chance, prompts[number], plain[number].text)
            if one.kind != "missed":
                done.append(one)
        after = memory([found.gateway])
        held = [member.stage()["pages_used"] for member in found.stages]
    undisturbed = statistics.median(each.gap_s for each in plain)
    bench.row(what=f"{compute}, undisturbed", answers=len(plain), gap_p50_s=round(undisturbed, 3))
    for kind in kinds:
        some = [each for each in done if each.kind == kind]
        gaps = [each.gap_s for each in some]
        bench.row(
            what=f"{compute}, {kind}",
            answers=len(some),
            same=sum(each.same for each in some),
            errors=sum(bool(each.error) for each in some),
            gap_p50_s=round(statistics.median(gaps), 3),
            gap_p95_s=round(percentile(gaps, 95), 3),
            gap_max_s=round(max(gaps), 3),
        )
    for each in done:
        if not each.same and compute == "int8":
            print(f"DIFFERENT: {each}")
    if compute == "int8":
        same = sum(each.same for each in done) / len(done)
        bench.aim("answers that are the same, exact class", "= 1", got=same, holds=same == 1)
        bench.aim("pages held in the end", "= 0", got=sum(held), holds=sum(held) == 0)
        grown = sum(after) / sum(before)
        bench.aim("the gateway's memory, after / before", "<= 1.1", got=grown, holds=grown <= 1.1)
    return done


def main() -> None:
    bench = Bench("recovery", __doc__)
    hits = measure(bench, "int8", 6 if bench.quick else 50, ["killed", "asleep"])
    gap = percentile([each.gap_s for each in hits], 95)
    bench.aim("seconds of the gap, p95 of kills and sleeps", "<= 2", got=gap, holds=gap <= 2)
    if not bench.quick:
        measure(bench, "int8", 10, ["leaving"])
        measure(bench, "bf16", 20, ["killed", "asleep"])
    bench.finish()


if __name__ == "__main__":
    main()
