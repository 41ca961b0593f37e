"""What precision costs: held-out loss, how far logits stray, and the speed of one token.

The built-in model reads the modules that it never learned from (scripts/builtin_corpus.py), with
each way to keep weights, through the stage that serves (`engine.Stage`), in windows of its context.
All ways read the same window in turn; float32 is what the others are compared with. The exact
classes read some of the windows without the compiled library, too, and must give the same bits.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args
from unittest import mock

import torch
from contract import Bench
from torch import Tensor
from torch.nn import functional

from shoal.engine.request import Sampling
from shoal.engine.rows import Row
from shoal.engine.sampling import SamplerState
from shoal.engine.stage import Stage, StageConfig
from shoal.engine.thread import set_threads
from shoal.errors import ShoalError
from shoal.exact import native
from shoal.models.checkpoint import BUILTIN, open_checkpoint
from shoal.models.slice import load_slice
from shoal.models.text import Tokenizer
from shoal.node.choosing import AUTO
from shoal.units import Quant, SessionId

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from builtin_corpus import SourceFile, split, standard_library  # type: ignore[import-not-found]

# T tokens of a window · V tokens of the vocabulary

CONTEXT, PAGE, PROMPT, PLAIN = 1024, 16, 128, "without the library"
PLAIN_EVERY = 8  # windows: it is slow
REFERENCE, OTHERS = "f32", ("bf16",)
ALLOWED = 0.5  # % of the float32 loss that `--quant auto` may cost


@dataclass
class Variant:
    """One way to compute, and what was seen of it."""

    name: str
    quant: Quant
    dtype: str | None
    library: bool
    stage: Stage = field(init=False)
    nats: float = 0.0
    tokens: int = 0
    agreed: int = 0  # tokens of which the likeliest is the same as in float32
    furthest: float = 0.0  # of any logit from float32's
    divergence: float = 0.0  # nats, summed over tokens: KL(float32, this)
    seconds: list[float] = field(default_factory=list)

    def load(self) -> None:
        checkpoint = open_checkpoint(BUILTIN)
        with self.as_built():
            model = load_slice(checkpoint, checkpoint.whole, self.dtype, self.quant)
            self.stage = Stage(model, StageConfig(page_size=PAGE, pages=CONTEXT // PAGE))

    def as_built(self) -> AbstractContextManager[object]:
        return (
            nullcontext() if self.library else mock.patch.object(native, "load", return_value=None)
        )

    def read(self, ids: Sequence[int]) -> Tensor:
        """Logits (T, V) of what follows each id: all but the first are a draft, so none is left
        out.
        """
        row = Row(SessionId("read"), 0, range(CONTEXT // PAGE), len(ids), ids, draft=ids[1:])
        with self.as_built():
            return self.stage.logits([row], [0])

    def compare(self, logits: Tensor, reference: Tensor, following: Tensor) -> None:
        self.nats += functional.cross_entropy(logits, following, reduction="sum").item()
        self.tokens += len(following)
        self.agreed += int((logits.argmax(-1) == reference.argmax(-1)).sum())
        self.furthest = max(self.furthest, (logits - reference).abs().max().item())
        own, true = logits.log_softmax(-1), reference.log_softmax(-1)
        self.divergence += functional.kl_div(own, true, reduction="sum", log_target=True).item()

    def write(self, prompt: Sequence[int], count: int) -> None:
        """Greedily go on after the prompt; notes the seconds of each token."""
        session, pages = SessionId("write"), range(CONTEXT // PAGE)
        sampler = SamplerState(Sampling(temperature=0, max_tokens=count), prompt)
        row = Row(session, 0, pages, len(prompt), prompt, sampler=sampler)
        with self.as_built():
            for position in range(len(prompt), len(prompt) + count):
                started = time.perf_counter()
                (chosen,) = self.stage.step([row]).sampled[0]
                if row.start:
                    self.seconds.append(time.perf_counter() - started)
                row = Row(session, position, pages, 1, (chosen.token,), sampler=sampler)


def variants() -> list[Variant]:
    """Each compute class, float32 first."""
    found = [Variant(name, "none", name, True) for name in (REFERENCE, *OTHERS)]
    return found + [Variant(each, each, None, True) for each in get_args(Quant) if each != "none"]


def load(bench: Bench) -> list[Variant]:
    """Those that this machine can compute; exact ones without the library, too."""
    loaded: list[Variant] = []
    for variant in variants():
        try:
            variant.load()
        except ShoalError as error:
            bench.absent(variant.name, error.message)
            continue
        loaded.append(variant)
        if variant.stage.model.exact and native.load() is not None:
            plain = Variant(f"{variant.name}, {PLAIN}", variant.quant, variant.dtype, False)
            plain.load()
            loaded.append(plain)
    return loaded


def windows(files: Sequence[SourceFile]) -> Iterator[list[int]]:
    """Each file by itself, the end of text in front; windows share one token."""
    tokenizer = Tokenizer.open(open_checkpoint(BUILTIN).folder)
    for file in files:
        ids = [0, *tokenizer.encode(file.text)]
        for start in range(0, len(ids) - 1, CONTEXT):
            yield ids[start : start + CONTEXT + 1]


def read_all(files: Sequence[SourceFile], loaded: Sequence[Variant]) -> int:
    """Returns how many logits differ without the library."""
    unequal = 0
    for number, ids in enumerate(windows(files)):
        following = torch.tensor(ids[1:])
        reference = latest = loaded[0].read(ids[:-1])
        for variant in loaded:
            if not variant.library:  # it follows the same with the library
                if number % PLAIN_EVERY == 0:
                    unequal += int((variant.read(ids[:-1]) != latest).sum())
                continue
            latest = reference if variant is loaded[0] else variant.read(ids[:-1])
            variant.compare(latest, reference, following)
    return unequal


def write_all(prompt: Sequence[int], loaded: Sequence[Variant], rounds: int, tokens: int) -> None:
    for _ in range(rounds):
        for variant in loaded:
            variant.write(prompt, tokens)


def report(bench: Bench, loaded: Sequence[Variant], byte_count: int, unequal: int) -> None:
    reference, read = loaded[0], [each for each in loaded if each.library]
    costs = {each.name: 100 * (each.nats / reference.nats - 1) for each in read}
    for each in loaded:
        speed = 1 / statistics.median(each.seconds)
        if not each.library:
            bench.row(what=each.name, tokens_per_s=speed)
            continue
        bench.row(
            what=each.name,
            bits_per_byte=f"{each.nats / math.log(2) / byte_count:.4f}",
            loss_percent=f"{costs[each.name]:+.3f}",
            largest_logit_error=each.furthest,
            kl_nats=f"{each.divergence / each.tokens:.1e}",
            same_token_percent=f"{100 * each.agreed / each.tokens:.1f}",
            tokens_per_s=speed,
        )
    name = f"loss of {AUTO}, which is auto, in % above float32"
    bench.aim(name, f"<= {ALLOWED}", got=costs[AUTO], holds=costs[AUTO] <= ALLOWED)
    if len(read) < len(loaded):
        bench.aim(f"logits that differ {PLAIN}", "0", got=unequal, holds=unequal == 0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    bench = Bench("quality", __doc__, parser=parser)
    set_threads(bench.options.threads)
    _, files = split(standard_library())
    if bench.quick:
        files = sorted(files, key=lambda file: file.byte_count)[:10]
    loaded = load(bench)
    with torch.inference_mode():
        unequal = read_all(files, loaded)
        prompt = max(windows(files), key=len)[:PROMPT]
        write_all(prompt, loaded, 3 if bench.quick else 10, 64)
    report(bench, loaded, sum(file.byte_count for file in files), unequal)
    bench.finish()


if __name__ == "__main__":
    main()
