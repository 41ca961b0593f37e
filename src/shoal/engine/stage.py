"""Runs one slice of one model on this machine: rows in, hidden states or tokens out.

One `step` is one ragged forward of everything that is ready, chunks of prompts and single tokens
together.
T tokens of this step · E hidden width · R positions to sample after · V vocabulary
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ..exact import native
from ..models.slice import ModelSlice
from ..units import SessionId
from . import wire
from .batched_kv import BatchedKv
from .compiled_kv import CompiledKv, exact_kv
from .exact_kv import ExactKv
from .graphs import DecodeGraphs, Record, recorder
from .kv import PagedKv, kv_bytes_per_token, kv_layout, reach, state_layout
from .plan import StepPlan
from .request import Sampled
from .rows import Row
from .sampling import verify
from .states import SessionStates, state_bytes
from .thread import set_threads
from .threads import ThreadTuner

MOST_SLOTS = 64
SLOTS_SHARE = 4  # at most one part in so many of the memory beside the weights


@dataclass(kw_only=True, frozen=True, slots=True)
class StageConfig:
    page_size: int = 16  # tokens
    pages: int = 256
    slots: int = 16  # sessions at a time, where layers keep a running state


@dataclass(frozen=True, slots=True)
class StepResult:
    """`hidden` is (T, E) contiguous, None on a last stage; `sampled[i]` belongs to row i: one token
    and those of its draft that were right, () where not asked for.
    """

    hidden: Tensor | None
    sampled: list[tuple[Sampled, ...]]


def slots_for(model: ModelSlice, memory_bytes: int) -> int:
    """How many sessions' running states to set aside; 0 where no layer keeps one, or no room is."""
    each = state_bytes(state_layout(model))
    if not each:
        return 0
    return min(MOST_SLOTS, max(1, memory_bytes // SLOTS_SHARE // each), memory_bytes // each)


def pages_for(model: ModelSlice, memory_bytes: int, page_size: int = 16) -> int:
    """How many pages of KV cache fit into so much memory beside the states; 0 when not even one
    does. Where no layer keeps keys and values, pages take nothing and are as many as you like.
    """
    states, slots = state_bytes(state_layout(model)), slots_for(model, memory_bytes)
    if states and not slots:
        return 0
    page = kv_bytes_per_token(kv_layout(model), exact=model.exact) * page_size
    return (memory_bytes - slots * states) // page if page else sys.maxsize


class Stage:
    """A slice with its KV cache. Whose the pages are is told with each row.

    With a `tuner`, steps are timed and the number of threads follows it.
    """

    def __init__(
        self,
        model: ModelSlice,
        config: StageConfig | None = None,
        *,
        tuner: ThreadTuner | None = None,
        clock: Callable[[], float] = time.perf_counter,
        record: Record | None = None,
    ) -> None:
        """`record` None records steps on CUDA devices alone; see graphs.py."""
        self._tuner, self._clock = tuner, clock
        self.config = config or StageConfig()
        self.model = model
        layout = kv_layout(model)
        self.window = reach(layout)
        self.kv_bytes_per_token = kv_bytes_per_token(layout, exact=model.exact)
        states = state_layout(model)
        self.keeps_states = bool(states)
        self._states = SessionStates(states, self.config.slots, model.device)
        direct = all(layer.direct for layer in layout.values())
        if record is None and model.device.type == "cuda":
            record = recorder(model.device)
        if not direct or self.keeps_states or not model.asks_nothing:
            record = None
        self._graphs = None if record is None else self._decode_graphs(record)
        pages = self.config.pages + (self._graphs is not None)  # one that no session has
        size = pages, self.config.page_size, model.device
        on_cpu = model.device.type == "cpu" and self._graphs is None
        self._kv: ExactKv | PagedKv
        if model.exact and direct:
            self._kv = exact_kv(layout, *size) if on_cpu else ExactKv(layout, *size)
        else:
            self._kv = (PagedKv if on_cpu else BatchedKv)(layout, *size, self._states)
        self._compiled = model.dense is not None and isinstance(self._kv, CompiledKv)
        library = native.load()
        if tuner is not None:
            set_threads(tuner.count, of_torch=not self._compiled)
        elif library is not None:  # whatever the stage before this one needed
            set_threads(library.threads, of_torch=not self._compiled)

    def _decode_graphs(self, record: Record) -> DecodeGraphs:
        model, config = self.model, self.config
        return DecodeGraphs(
            self._compute,
            record,
            page_size=config.page_size,
            spare=config.pages,
            hidden=None if model.first else (model.hidden_size, model.dtype),
            device=model.device,
            most_context=config.pages * config.page_size,
        )

    def forget(self, session: SessionId) -> None:
        """It has ended. Only running states need to know: who has the pages is not told here."""
        self._states.forget(session)

    @torch.inference_mode()
    def step(self, rows: Sequence[Row]) -> StepResult:
        """One forward of all rows. Raises ValueError for rows that do not fit their pages or this
        stage.
        """
        chosen: list[tuple[Sampled, ...]] = [()] * len(rows)
        if not self.model.last:
            return StepResult(self._forward(rows, None).contiguous(), chosen)
        asked = [index for index, row in enumerate(rows) if row.sampler is not None]
        logits = self.logits(rows, asked)
        states = [row.sampler for row in rows if row.sampler is not None]
        drafts = [rows[index].draft for index in asked]
        for index, some in zip(asked, verify(logits, states, drafts), strict=True):
            chosen[index] = some
        return StepResult(None, chosen)

    @torch.inference_mode()
    def logits(self, rows: Sequence[Row], asked: Sequence[int]) -> Tensor:
        """One forward on a last stage; returns float32 (R, V), what follows the last token of each
        row asked for; of a row with a draft, the token before it and all of its tokens.
        """
        if not asked:  # prompts in progress: the head is not needed
            self._forward(rows, None)
            return torch.empty(0, self.model.vocab_size)
        ends = list(accumulate(row.count for row in rows))
        lines = [
            line
            for index in asked
            for line in range(ends[index] - 1 - len(rows[index].draft), ends[index])
        ]
        return self._forward(rows, lines).float()

    @property
    def recordings(self) -> int:
        """How many shapes of steps are played back by now."""
        return 0 if self._graphs is None else len(self._graphs)

    def _compute(self, plan: StepPlan, x: Tensor) -> Tensor:
        """All rows' logits, or hidden states."""
        self._kv.begin(plan)
        lines = plan.wanted if self.model.last else None
        out: Tensor = self.model(x, plan.positions, self._kv, self._kv, lines, plan.highest)
        return out

    def _forward(self, rows: Sequence[Row], wanted: Sequence[int] | None) -> Tensor:
        if self._graphs is not None and (found := self._graphs.run(rows)) is not None:
            every = wanted is None or len(wanted) == len(rows)
            return found if every else found[wanted]
        plan = StepPlan.of(rows, self.config.page_size, self.model.device, wanted or ())
        x = plan.ids if self.model.first else self._hidden(rows)
        if len(x) != len(plan.positions):
            raise ValueError(f"{len(plan.positions)} tokens announced, {len(x)} given")
        self._kv.begin(plan)
        self._states.begin(rows)
        started = self._clock()
        lines = None if wanted is None else plan.wanted
        hidden: Tensor = self.model(x, plan.positions, self._kv, self._kv, lines, plan.highest)
        self._states.end(rows)
        if self._tuner is not None:
            self._tune(self._tuner, len(x), self._clock() - started)
        return hidden

    def _tune(self, tuner: ThreadTuner, tokens: int, seconds: float) -> None:
        before = tuner.count
        if tuner.took(tokens, seconds) != before:
            set_threads(tuner.count, of_torch=not self._compiled)

    def _hidden(self, rows: Sequence[Row]) -> Tensor:
        parts = [row.hidden for row in rows if row.hidden is not None]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        return joined.to(self.model.device, non_blocking=True)

    # ---- between stages

    def hidden_to_wire(
        self, result: StepResult, rows: Sequence[Row], chosen: Sequence[int]
    ) -> memoryview:
        """The hidden states of some rows of a step, one after the other, as raw little-endian
        bytes.
        """
        if result.hidden is None:
            raise ValueError("a last stage has no hidden states to send")
        if len(chosen) == len(rows):
            return wire.hidden_to_wire(result.hidden)
        parts = torch.split(result.hidden, [row.count for row in rows])
        return wire.hidden_to_wire(torch.cat([parts[index] for index in chosen]))

    def hidden_from_wire(self, buffer: bytes | bytearray | memoryview, count: int) -> Tensor:
        """(count, E) from a peer's bytes. Raises BadMessage when there are more or fewer."""
        return wire.hidden_from_wire(buffer, self.model.dtype_name, self.model.hidden_size, count)
