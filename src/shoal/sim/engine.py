"""The twin of an engine stage: exact about whose rows are where, and as slow as it is told to be.

It has the surface of `engine.Stage` that the pipeline uses. Hidden states are the chain of the text
so far, hidden by a key of the layer that comes next. Each page keeps the chain of its tokens and
which layers were computed: a row that follows on something else than what its pages hold, or that
skips layers, spoils all that comes after it.

W words of a hidden state: the chain up to the token · the chain before it · the bytes it stands for
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

from ..engine.pace import Work
from ..engine.request import Sampled, Sampling
from ..engine.rows import Row
from ..errors import BadMessage
from ..hardware import Speed
from ..transport import Bytes, Frame
from ..units import SessionId, Slice
from .model import ROOT, SimModel, mix

WORDS = 3
ROW_BYTES = 8 * WORDS
SPOILT = 0xDEAD
MARK = 0x51A7E5 << 40  # in the third word of each hidden state, above the bytes it stands for


class Timing(Protocol):
    def __call__(self, layers: int, rows: Sequence[Row]) -> float:
        """Seconds of one forward of these rows through so many layers."""


def by_speed(speed: Speed) -> Timing:
    """As the cost formula says."""

    def seconds(layers: int, rows: Sequence[Row]) -> float:
        work = Work.of(rows)
        return speed.seconds(layers, work.tokens, work.context, work.sampled)

    return seconds


def by_profile(profile: Callable[[int, int, int], float]) -> Timing:
    """`profile(decode rows, prompt tokens, tokens in their caches)`: measured seconds a layer."""

    def seconds(layers: int, rows: Sequence[Row]) -> float:
        decoding = sum(row.generates for row in rows)
        prompt_tokens = sum(row.count for row in rows if not row.generates)
        return layers * profile(decoding, prompt_tokens, sum(row.stop for row in rows))

    return seconds


class SimSampler:
    """The twin of `SamplerState`: it knows how many tokens an answer has."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], output: Sequence[int]) -> None:
        self.sampling, self.position = sampling, len(output)

    def choose(self, chosen: Sequence[int], draft: Sequence[int]) -> tuple[Sampled, ...]:
        """The tokens that follow, as far as the draft foretold them and one more."""
        sampled: list[Sampled] = []
        for token, guess in zip(chosen, (*draft, None), strict=True):
            self.position += 1
            over = self.position >= self.sampling.max_tokens
            sampled.append(Sampled(token, "length" if over else ""))
            if over or token != guess:
                break
        return tuple(sampled)


@dataclass(frozen=True, slots=True)
class SimResult:
    """`hidden[i]` and `sampled[i]` belong to row i; both are empty where there is nothing."""

    hidden: list[bytes]
    sampled: list[tuple[Sampled, ...]]


@dataclass(frozen=True, slots=True)
class _Dtype:
    itemsize: int = ROW_BYTES


@dataclass(frozen=True, slots=True)
class SimSlice:
    """What the pipeline asks of a stage's model."""

    first: bool
    last: bool
    hidden_size: int = 1
    dtype: _Dtype = _Dtype()
    exact: bool = True


@dataclass(frozen=True, slots=True)
class SimStageConfig:
    page_size: int
    pages: int
    slots: int = 0


class _Page:
    """Of each token the chain up to it and the layers that were computed; the chain before all."""

    __slots__ = ("before", "chains", "parts")

    def __init__(self, size: int) -> None:
        self.before = 0
        self.chains = array("Q", bytes(8 * size))
        self.parts: list[Slice | None] = [None] * size


class SimStage:
    """`spend(seconds)` is told what a step takes."""

    keeps_states = False
    window: int | None = None

    def __init__(
        self,
        model: SimModel,
        layers: Slice,
        config: SimStageConfig,
        timing: Timing,
        spend: Callable[[float], None],
    ) -> None:
        self.model = SimSlice(layers.start == 0, layers.stop == model.layers)
        self.config, self.layers = config, layers
        self.slowness = 1.0  # times as slow as it should be
        self._of, self._timing, self._spend = model, timing, spend
        self._pages: dict[int, _Page] = {}

    def forget(self, session: SessionId) -> None:
        """Nothing is kept but pages."""

    def step(self, rows: Sequence[Row]) -> SimResult:
        """One forward for each part of the slice that is asked for. Raises ValueError for a part
        that is not ours.
        """
        parts = [self._part(row) for row in rows]
        pairs = sorted(zip(parts, rows, strict=True), key=lambda pair: pair[0])
        for part, same in groupby(pairs, key=lambda pair: pair[0]):
            took = self._timing(len(part), [row for _, row in same])
            self._spend(self.slowness * took)
        return self._computed(rows, parts)

    def hidden_to_wire(
        self, result: SimResult, rows: Sequence[Row], chosen: Sequence[int]
    ) -> memoryview:
        return memoryview(b"".join(result.hidden[index] for index in chosen))

    def hidden_from_wire(self, buffer: Bytes, count: int) -> bytes:
        """Raises BadMessage when these are not `count` tokens."""
        if len(buffer) != count * ROW_BYTES:
            raise BadMessage(f"{len(buffer)} bytes of hidden states for {count} tokens")
        return bytes(buffer)

    def _part(self, row: Row) -> Slice:
        part: Slice = getattr(row, "layers", None) or self.layers
        if not self.layers.start <= part.start < part.stop <= self.layers.stop:
            raise ValueError(f"layers {part} are not among {self.layers}")
        return part

    def _computed(self, rows: Sequence[Row], parts: Sequence[Slice]) -> SimResult:
        hidden: list[bytes] = []
        sampled: list[tuple[Sampled, ...]] = []
        for row, part in zip(rows, parts, strict=True):
            chains = self._chains(row, part)
            last = part.stop == self._of.layers
            hidden.append(b"" if last else self._hide(chains, part.stop))
            sampled.append(self._choose(row, chains) if last else ())
        return SimResult(hidden, sampled)

    def _choose(self, row: Row, chains: Sequence[int]) -> tuple[Sampled, ...]:
        ends = chains[-1 - len(row.draft) :]
        return choose(row, [self._of.token(chain) for chain in ends])

    # ---- chains: `chains[0]` is that before the row's first token

    def _chains(self, row: Row, part: Slice) -> Sequence[int]:
        chains = self._follow(row) if part.start == 0 else self._reveal(row, part.start)
        if not self._fits(row, chains[0], part):
            chains = [mix(chain, SPOILT) for chain in chains]
        self._keep(row, chains, part)
        return chains

    def _follow(self, row: Row) -> list[int]:
        """A first stage reads what came before from its pages."""
        if row.ids is None:
            raise ValueError("a first stage computes token ids")
        page = self._page(row, row.start - 1) if row.start else None
        chain = ROOT if page is None else page.chains[(row.start - 1) % self.config.page_size]
        chains = [chain]
        for token in row.ids:
            chain = mix(chain, token)
            chains.append(chain)
        return chains

    def _reveal(self, row: Row, start: int) -> list[int]:
        """Any other stage is told; what it is told has to hang together."""
        key, words = self._of.keys[start], array("Q", bytes(row.hidden or b""))
        if sys.byteorder == "big":
            words.byteswap()
        if len(words) != WORDS * row.count:
            raise ValueError(f"{len(words)} words of hidden states for {row.count} tokens")
        chains, before = words[0::WORDS], words[1::WORDS]
        spoilt = SPOILT if before[1:] != chains[:-1] else 0
        return [before[0] ^ key, *(chain ^ key ^ spoilt for chain in chains)]

    def _hide(self, chains: Sequence[int], stop: int) -> bytes:
        key, count = self._of.keys[stop], len(chains) - 1
        hidden = array("Q", [chain ^ key for chain in chains])
        words = array("Q", bytes(count * ROW_BYTES))
        words[0::WORDS], words[1::WORDS] = hidden[1:], hidden[:-1]
        words[2::WORDS] = array("Q", [MARK | self._of.activation_bytes]) * count
        if sys.byteorder == "big":
            words.byteswap()
        return words.tobytes()

    def _fits(self, row: Row, before: int, part: Slice) -> bool:
        """The row goes on from what its pages hold: those just before it, and one further back."""
        if not row.start:
            return before == ROOT
        size = self.config.page_size
        page = self._page(row, row.start - 1)
        last = (row.start - 1) % size
        if page.chains[last] != before or not _covers(page.parts[last], part):
            return False
        pages = (row.start - 1) // size + 1
        if pages < 2:
            return True
        far = 1 + before % (pages - 1)  # another one each time
        here, there = self._page(row, far * size), self._page(row, far * size - 1)
        joined = here.before == there.chains[-1]
        return joined and _covers(here.parts[0], part) and _covers(there.parts[-1], part)

    def _keep(self, row: Row, chains: Sequence[int], part: Slice) -> None:
        size, at = self.config.page_size, 1
        while at < len(chains):
            position = row.start + at - 1
            page, first = self._page(row, position), position % size
            count = min(size - first, len(chains) - at)
            if first == 0:
                page.before = chains[at - 1]
            page.chains[first : first + count] = array("Q", chains[at : at + count])
            page.parts[first : first + count] = [part] * count
            at += count

    def _page(self, row: Row, position: int) -> _Page:
        number = row.pages[position // self.config.page_size]
        if not 0 <= number < self.config.pages:
            raise ValueError(f"position {position} has no page")
        page = self._pages.get(number)
        if page is None:
            page = self._pages[number] = _Page(self.config.page_size)
        return page


class SketchStage(SimStage):
    """Takes as long and sends as much, and computes nothing: for runs that only ask how fast."""

    def _computed(self, rows: Sequence[Row], parts: Sequence[Slice]) -> SimResult:
        hidden: list[bytes] = []
        sampled: list[tuple[Sampled, ...]] = []
        token = bytes(8 * (WORDS - 1)) + (MARK | self._of.activation_bytes).to_bytes(8, "little")
        for row, part in zip(rows, parts, strict=True):
            last = part.stop == self._of.layers
            hidden.append(b"" if last else token * row.count)
            sampled.append(choose(row, [0] * (1 + len(row.draft))) if last else ())
        return SimResult(hidden, sampled)


def choose(row: Row, tokens: Sequence[int]) -> tuple[Sampled, ...]:
    """`tokens` follow the one before the row's draft, and each of the draft's."""
    sampler = row.sampler
    if sampler is None:
        return ()
    assert isinstance(sampler, SimSampler)  # noqa: S101 - the only kind that is made here
    return sampler.choose(tokens, row.draft)


def more_bytes(frame: Frame) -> int:
    """How many bytes a frame stands for beside its own: hidden states are small here."""
    body = memoryview(frame.body).cast("B")
    if len(body) < ROW_BYTES or len(body) % ROW_BYTES:
        return 0
    word = int.from_bytes(body[ROW_BYTES - 8 : ROW_BYTES], "little")
    if word >> 40 != MARK >> 40:
        return 0
    return (word & ((1 << 40) - 1)) * (len(body) // ROW_BYTES) - len(body)


def _covers(whole: Slice | None, part: Slice) -> bool:
    return whole is not None and whole.start <= part.start and part.stop <= whole.stop
