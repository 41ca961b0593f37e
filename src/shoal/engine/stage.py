"""Runs one slice of one model on this machine: rows in, hidden states or tokens out.

One `step` is one ragged forward of everything that is ready, chunks of prompts and single tokens
together. Rows that run but a part of the slice have a forward for each part.
T tokens of this step · E hidden width · R positions to sample after · V vocabulary
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

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
from .parts import Portion, by_part, in_order
from .plan import StepPlan
from .request import Sampled
from .rows import Row
from .sampling import verify
from .states import SessionStates, state_bytes
from .thread import set_threads
from .threads import ThreadTuner

MOST_SLOTS = 64
SLOTS_SHARE = 4  # at most one part in so many of the memory beside the weights
MOST_PARTS = 32  # kept at hand


@dataclass(kw_only=True, frozen=True, slots=True)
class StageConfig:
    page_size: int = 16  # tokens
    pages: int = 256
    slots: int = 16  # sessions at a time, where layers keep a running state


@dataclass(frozen=True, slots=True)
class StepResult:
    """`hidden` is (T, E) contiguous: the tokens of those rows that yield hidden states, in the
    order of the rows; None when no row does. On a stage without the model's last layer all rows
    do, else those whose part ends before it (`Stage.yields`). `sampled[i]` belongs to row i: one
    token and those of its draft that were right, () where not asked for.
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


@dataclass(frozen=True, slots=True, eq=False)
class _Forward:
    """What is ready to be computed: rows that run the same layers."""

    model: ModelSlice
    rows: Sequence[Row]
    plan: StepPlan
    x: Tensor
    lines: Tensor | None  # after which logits are wanted


class Stage:
    """A slice with its KV cache. Whose the pages are is told with each row.

    With a `tuner`, steps are timed and the number of threads follows it.
    """

    runs_parts = True  # a row's `layers` may be some of the slice's

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
        self._part = lru_cache(maxsize=MOST_PARTS)(model.part)
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
        self._no_logits = torch.empty(0, model.vocab_size)
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

    def yields(self, row: Row) -> bool:
        """Whether the row gives hidden states: it does not reach the model's last layer."""
        own = self.model.layers
        return not self.model.last or (row.layers is not None and row.layers.stop != own.stop)

    @torch.inference_mode()
    def step(self, rows: Sequence[Row]) -> StepResult:
        """One forward of all rows, or of those of each part. Raises ValueError for rows that do not
        fit their pages or this stage.
        """
        chosen: list[tuple[Sampled, ...]] = [()] * len(rows)
        asked = [
            index
            for index, row in enumerate(rows)
            if row.sampler is not None and not self.yields(row)
        ]
        hidden, logits = self._run(rows, asked)
        states = [state for index in asked if (state := rows[index].sampler) is not None]
        drafts = [rows[index].draft for index in asked]
        for index, some in zip(asked, verify(logits, states, drafts), strict=True):
            chosen[index] = some
        return StepResult(hidden, chosen)

    @torch.inference_mode()
    def logits(self, rows: Sequence[Row], asked: Sequence[int]) -> Tensor:
        """One forward on a last stage; returns float32 (R, V), what follows the last token of each
        row asked for; of a row with a draft, the token before it and all of its tokens.
        """
        return self._run(rows, asked)[1]

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

    def _run(self, rows: Sequence[Row], asked: Sequence[int]) -> tuple[Tensor | None, Tensor]:
        """Hidden states of those rows that yield some, and logits (R, V) of those asked for. What
        is wrong with a row is found before any is computed.
        """
        portions = by_part(rows, asked, self.model.layers)
        if (played := self._played(portions)) is not None:
            return played
        forwards = [self._prepared(portion) for portion in portions]
        self._states.begin(rows)
        found = [self._forward(forward) for forward in forwards]
        self._states.end(rows)
        hidden, logits = [], []
        for portion, forward, out in zip(portions, forwards, found, strict=True):
            if not forward.model.last:
                hidden.append((portion.at, out))
            elif portion.asked:
                logits.append(([portion.at[place] for place in portion.asked], out.float()))
        return (
            in_order(hidden, [row.count for row in rows]).contiguous() if hidden else None,
            in_order(logits, [1 + len(row.draft) for row in rows]) if logits else self._no_logits,
        )

    def _played(self, portions: Sequence[Portion]) -> tuple[Tensor | None, Tensor] | None:
        """The same, where the step is one that is played back: single tokens, and all layers."""
        one = portions[0]
        if self._graphs is None or len(portions) > 1 or one.layers != self.model.layers:
            return None
        found = self._graphs.run(one.rows)
        if found is None or not self.model.last:
            return None if found is None else (found, self._no_logits)
        every = len(one.asked) == len(one.rows)
        return None, (found if every else found[list(one.asked)]).float()

    def _prepared(self, portion: Portion) -> _Forward:
        lines = portion.lines
        model = self._part(portion.layers) if portion.layers != self.model.layers else self.model
        plan = StepPlan.of(portion.rows, self.config.page_size, model.device, lines)
        x = plan.ids if model.first else portion.hidden.to(model.device, non_blocking=True)
        if len(x) != len(plan.positions):
            raise ValueError(f"{len(plan.positions)} tokens announced, {len(x)} given")
        return _Forward(model, portion.rows, plan, x, plan.wanted if lines else None)

    def _forward(self, ready: _Forward) -> Tensor:
        model, plan, x = ready.model, ready.plan, ready.x
        self._kv.begin(plan)
        self._states.select(ready.rows)
        started = self._clock()
        out: Tensor = model(x, plan.positions, self._kv, self._kv, ready.lines, plan.highest)
        if self._tuner is not None:
            self._tune(self._tuner, len(x), self._clock() - started, len(model.layers))
        return out

    def _tune(self, tuner: ThreadTuner, tokens: int, seconds: float, layers: int) -> None:
        before = tuner.count
        if tuner.took(tokens, seconds, layers) != before:
            set_threads(tuner.count, of_torch=not self._compiled)

    # ---- between stages

    def hidden_to_wire(
        self, result: StepResult, rows: Sequence[Row], chosen: Sequence[int]
    ) -> memoryview:
        """The hidden states of the `chosen` rows of a step, one after the other, as raw
        little-endian bytes. `rows` are all rows of the step. Raises ValueError for a chosen one
        that yields none.
        """
        given = [index for index, row in enumerate(rows) if self.yields(row)]
        if result.hidden is None or not set(chosen) <= set(given):
            raise ValueError("rows that reach the last layer have no hidden states to send")
        if len(chosen) == len(given):
            return wire.hidden_to_wire(result.hidden)
        each = torch.split(result.hidden, [rows[index].count for index in given])
        parts = dict(zip(given, each, strict=True))
        return wire.hidden_to_wire(torch.cat([parts[index] for index in chosen]))

    def hidden_from_wire(self, buffer: bytes | bytearray | memoryview, count: int) -> Tensor:
        """(count, E) from a peer's bytes. Raises BadMessage when there are more or fewer."""
        return wire.hidden_from_wire(buffer, self.model.dtype_name, self.model.hidden_size, count)
