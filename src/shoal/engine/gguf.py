"""llama.cpp as the engine of one slice of a GGUF file, with the surface of `stage.Stage`.

The slice is written into a file of its own that is deleted as soon as it is loaded. Hidden states
go in at the bottom, on the first stage from the embedding, which is read row by row from the GGUF
file; they come out above the last layer, before the final norm. A session is a sequence of
llama.cpp's cache. Which sequences are over is known by their pages: a page that comes back with
another session has changed hands.
T tokens of this step · E hidden width · R positions to sample after · V vocabulary
"""

# ruff: noqa: N803, N806 - the letters at the end of an array's name are its axes

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from ..errors import NoCapacity
from ..models.gguf_checkpoint import EMBEDDING, GgufCheckpoint
from ..units import SessionId, Slice, readable_bytes
from .llama_library import (
    ContextSize,
    Embedding,
    Floats,
    LlamaLibrary,
    LlamaSlice,
    llama_library,
)
from .request import Sampled
from .rows import Row
from .sampling import verify
from .stage import StageConfig, StepResult
from .wire import hidden_from_wire, hidden_to_wire

MAX_SEQUENCES = 256  # of llama.cpp
BATCH_TOKENS = 1024  # a step has fewer: 512 of prompts, and a draft for each of 64 sessions

Forget = Callable[[int, int], None]  # a sequence, and the position from which on


@dataclass(frozen=True, slots=True)
class GgufModel:
    """What a worker asks of a stage's model."""

    layers: Slice
    first: bool
    last: bool
    hidden_size: int
    vocab_size: int
    nbytes: int
    exact: bool = False
    dtype: torch.dtype = torch.float32
    dtype_name: str = "f32"
    device: torch.device = torch.device("cpu")


def page_config(tokens: int, page_tokens: int) -> StageConfig:
    """Room for so many tokens, in no more pages than there are sequences: then every session finds
    one, since it has a page at least.
    """
    size = max(page_tokens, -(-tokens // MAX_SEQUENCES))
    return StageConfig(page_size=size, pages=tokens // size)


def load_gguf_stage(
    checkpoint: GgufCheckpoint,
    layers: Slice,
    *,
    memory_bytes: int,
    kv_tokens: int,
    page_tokens: int,
    scratch: Path | None,
) -> GgufStage:
    """A stage with room for `kv_tokens`, or as many as fit. Raises NoCapacity when none do."""
    weights = slice_bytes(checkpoint, layers)
    room = max(0, memory_bytes - weights) // (checkpoint.kv_bytes_per_token * len(layers))
    config = page_config(min(room, kv_tokens), page_tokens)
    if config.pages < 1:
        raise NoCapacity(
            f"layers {layers} of {checkpoint.name} leave no room for a KV cache: "
            f"{readable_bytes(weights)} of weights in {readable_bytes(memory_bytes)}",
            hint="serve fewer layers (--layers A:B) or allow more memory (--memory 80%)",
        )
    return GgufStage(checkpoint, layers, config, scratch=scratch)


class GgufStage:
    """A slice of a GGUF file with its cache. `scratch` is where the slice's file is put."""

    keeps_states = False  # sequences go with their pages
    runs_parts = False  # llama.cpp runs the layers of its file

    def __init__(
        self,
        checkpoint: GgufCheckpoint,
        layers: Slice,
        config: StageConfig,
        *,
        scratch: Path | None = None,
        threads: int | None = None,
    ) -> None:
        first, last = layers.start == 0, layers.stop == checkpoint.layers
        self.config = config
        self.model = GgufModel(
            layers,
            first,
            last,
            checkpoint.hidden_size,
            checkpoint.vocab_size,
            slice_bytes(checkpoint, layers),
        )
        library = llama_library()
        self._embedding = _embedding(library, checkpoint) if first else None
        size = ContextSize(
            tokens=config.pages * config.page_size,
            sessions=config.pages,
            batch_tokens=BATCH_TOKENS,
            threads=threads or torch.get_num_threads(),
        )
        with _slice_file(checkpoint, layers, scratch) as path:
            self._slice = LlamaSlice(library, path, size, None if last else len(layers) - 1)
        self._sequences = Sequences(config.pages, self._slice.forget)

    def close(self) -> None:
        """Free its memory; garbage collection does it too."""
        self._slice.close()
        if self._embedding is not None:
            self._embedding.close()

    # ---- a step

    def step(self, rows: Sequence[Row]) -> StepResult:
        """One forward of all rows. Raises ValueError for rows that do not fit, RuntimeError when
        llama.cpp cannot compute them.
        """
        if any(row.layers not in (None, self.model.layers) for row in rows):
            raise ValueError(f"runs all of its layers {self.model.layers} or none")
        x_TE = self._inputs(rows)
        sequences = [self._sequences.of(row) for row in rows]
        positions = [at for row in rows for at in range(row.start, row.stop)]
        owners = [s for s, row in zip(sequences, rows, strict=True) for _ in range(row.count)]
        try:
            return self._forward(rows, x_TE, positions, owners)
        except RuntimeError:
            self._sequences.drop(row.session for row in rows)  # what they have cached is unknown
            raise

    def _forward(
        self, rows: Sequence[Row], x_TE: Floats, positions: list[int], owners: list[int]
    ) -> StepResult:
        chosen: list[tuple[Sampled, ...]] = [()] * len(rows)
        if not self.model.last:
            hidden = self._slice.hidden(x_TE, positions, owners)
            return StepResult(torch.from_numpy(hidden), chosen)
        asked = [index for index, row in enumerate(rows) if row.sampler is not None]
        if not asked:
            self._slice.advance(x_TE, positions, owners)
            return StepResult(None, chosen)
        logits = self._slice.logits(x_TE, positions, owners, _lines(rows, asked))
        states = [row.sampler for row in rows if row.sampler is not None]
        drafts = [rows[index].draft for index in asked]
        told = verify(torch.from_numpy(logits), states, drafts)
        for index, some in zip(asked, told, strict=True):
            chosen[index] = some
        return StepResult(None, chosen)

    def _inputs(self, rows: Sequence[Row]) -> Floats:
        if self._embedding is not None:
            ids = [token for row in rows for token in row.ids or ()]
            x_TE = self._embedding.rows(ids)
        else:
            x_TE = torch.cat([row.hidden for row in rows if row.hidden is not None]).numpy()
        if len(x_TE) != sum(row.count for row in rows):
            raise ValueError(f"{len(x_TE)} tokens given, and not as many announced")
        return x_TE

    # ---- between stages

    def hidden_to_wire(
        self, result: StepResult, rows: Sequence[Row], chosen: Sequence[int]
    ) -> memoryview:
        """The hidden states of some rows of a step, one after the other, as raw little-endian
        bytes.
        """
        if result.hidden is None:
            raise ValueError("a last stage has no hidden states to send")
        parts = torch.split(result.hidden, [row.count for row in rows])
        return hidden_to_wire(torch.cat([parts[index] for index in chosen]))

    def hidden_from_wire(self, buffer: bytes | bytearray | memoryview, count: int) -> Tensor:
        """(count, E) from a peer's bytes. Raises BadMessage when there are more or fewer."""
        return hidden_from_wire(buffer, self.model.dtype_name, self.model.hidden_size, count)


class Sequences:
    """Which session has which sequence of the cache, and how much of it is filled. `forget` frees
    a sequence from a position on.
    """

    def __init__(self, count: int, forget: Forget) -> None:
        self._free = list(range(count))
        self._forget = forget
        self._by_session: dict[SessionId, _Sequence] = {}
        self._by_page: dict[int, SessionId] = {}

    def of(self, row: Row) -> int:
        """The sequence that this row continues, ready for it. Raises ValueError when tokens before
        it are missing.
        """
        mine = self._by_session.get(row.session)
        for page in row.pages:
            if (holder := self._by_page.get(page, row.session)) != row.session:
                self.drop((holder,))
        if row.start > (mine.filled if mine else 0):
            raise ValueError(f"tokens before {row.start} are not in the cache")
        if mine is None:
            mine = self._by_session[row.session] = _Sequence(self._free.pop())
        if mine.filled > row.start:  # a guess was wrong
            self._forget(mine.number, row.start)
        mine.filled, mine.pages = row.stop, tuple(row.pages)
        self._by_page.update(dict.fromkeys(row.pages, row.session))
        return mine.number

    def drop(self, sessions: Iterable[SessionId]) -> None:
        for session in sessions:
            gone = self._by_session.pop(session, None)
            if gone is not None:
                self._forget(gone.number, 0)
                self._free.append(gone.number)
                for page in gone.pages:
                    self._by_page.pop(page, None)


@dataclass(slots=True)
class _Sequence:
    number: int
    filled: int = 0
    pages: tuple[int, ...] = ()


def slice_bytes(checkpoint: GgufCheckpoint, layers: Slice) -> int:
    """Weights in memory; the embedding stays in the file."""
    blocks = sum(checkpoint.layer_bytes[layers.start : layers.stop])
    last = layers.stop == checkpoint.layers
    return blocks + (checkpoint.gguf.tensors[checkpoint.head].bytes if last else 0)


def _lines(rows: Sequence[Row], asked: Sequence[int]) -> list[int]:
    """Of a row with a draft, the token before it and all of its tokens."""
    ends = list(accumulate(row.count for row in rows))
    return [
        line
        for index in asked
        for line in range(ends[index] - 1 - len(rows[index].draft), ends[index])
    ]


def _embedding(library: LlamaLibrary, checkpoint: GgufCheckpoint) -> Embedding:
    table = checkpoint.gguf.tensors[EMBEDDING]
    width, _ = table.dimensions
    return Embedding(library, checkpoint.gguf.path, table.offset, table.type, width)


@contextlib.contextmanager
def _slice_file(checkpoint: GgufCheckpoint, layers: Slice, scratch: Path | None) -> Iterator[Path]:
    """A file that is gone when the block is left; who has it mapped goes on reading it."""
    if scratch is not None:
        scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=scratch, suffix=".gguf", delete=False) as out:
        path = Path(out.name)
        try:
            checkpoint.write_slice(layers, out)
            out.flush()
            yield path
        finally:
            path.unlink(missing_ok=True)
