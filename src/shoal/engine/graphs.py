"""Steps of single tokens, recorded once and played back: what a GPU computes is then not told to it
operation by operation, which for few tokens takes longer than computing.

A recording is of one shape, and reads and writes the same memory each time. So a step is filled up
to the next shape (`shape_of`): rows that stand for nobody write into a page that nobody has, and
contexts have room to grow. Everything but `record` works, and is tested, without a GPU.

B rows of one token · P pages of the longest context · E hidden width · V vocabulary
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .plan import StepPlan
from .rows import Row

ROWS = (1, 2, 4, 8, 16, 32)
FIRST_CONTEXT = 256  # tokens; the next shapes have twice as many each
MOST_SHAPES = 24
WORTH_IT = 3  # steps of one shape, from which on it is recorded

Play = Callable[[], Tensor]
Record = Callable[[Play], Play]  # what can be done again and again in the same memory
Compute = Callable[[StepPlan, Tensor], Tensor]  # (B,) ids or (B, E) -> (B, V) or (B, E)
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Shape:
    rows: int
    pages: int


def shape_of(rows: Sequence[Row], page_size: int, most_pages: int) -> Shape | None:
    """The smallest that holds this step; None for steps that are not of single tokens, or large."""
    if not rows or len(rows) > ROWS[-1] or not all(_plain(row, page_size) for row in rows):
        return None
    longest = max(row.stop for row in rows)
    context = FIRST_CONTEXT
    while context < longest:
        context *= 2
    pages = min(-(-context // page_size), most_pages)
    fits = pages * page_size >= longest
    return Shape(next(size for size in ROWS if size >= len(rows)), pages) if fits else None


def _plain(row: Row, page_size: int) -> bool:
    """One token, as it should be: others are told what is wrong with them elsewhere."""
    given = row.ids if row.hidden is None else row.hidden
    in_pages = 0 <= row.start < len(row.pages) * page_size
    return row.count == 1 and in_pages and given is not None and len(given) == 1


class _Recorded:
    """One shape: its buffers on the device and in host memory, and what is played."""

    def __init__(self, shape: Shape, hidden: tuple[int, torch.dtype] | None, spare: int) -> None:
        self.shape, self._spare = shape, spare
        numbers = 3 + shape.pages  # of each row: id, position, slot, pages
        self.host = torch.zeros(shape.rows, numbers, dtype=torch.int64)
        self.hidden = (
            None if hidden is None else torch.zeros(shape.rows, hidden[0], dtype=hidden[1])
        )
        self.play: Play
        self._pages: list[Sequence[int]] = [()] * shape.rows  # as they stand in the buffer
        self.host[:, 3:] = spare

    def place(self, device: torch.device) -> None:
        if device.type == "cuda":
            self.host = self.host.pin_memory()
        self.numbers = self.host.to(device, copy=True)
        self.hidden = None if self.hidden is None else self.hidden.to(device)

    def plan(self, page_size: int) -> tuple[StepPlan, Tensor]:
        """Made of the buffers, whatever will stand in them."""
        ids, positions, slots = (self.numbers[:, at] for at in range(3))
        plan = StepPlan.of_shape(ids, positions, slots, self.numbers[:, 3:], page_size)
        return plan, ids if self.hidden is None else self.hidden

    def fill(self, rows: Sequence[Row], page_size: int) -> None:
        """The step that has read these buffers last is over: its result was waited for."""
        empty = self.shape.rows - len(rows)
        slots = [
            row.pages[row.start // page_size] * page_size + row.start % page_size for row in rows
        ]
        own = [
            ((row.ids or (0,))[0], row.start, slot) for row, slot in zip(rows, slots, strict=True)
        ]
        self.host[:, :3] = torch.tensor(own + [(0, 0, self._spare * page_size)] * empty)
        for at, pages in enumerate([*(row.pages for row in rows), *[()] * empty]):
            if self._pages[at] != pages:
                self._pages[at] = pages
                self.host[at, 3:] = self._spare
                shown = torch.tensor(pages[: self.shape.pages])
                self.host[at, 3 : 3 + len(shown)] = shown
        self.numbers.copy_(self.host, non_blocking=True)
        if self.hidden is not None:
            parts = [row.hidden for row in rows if row.hidden is not None]
            self.hidden[: len(rows)].copy_(torch.cat(parts), non_blocking=True)


class DecodeGraphs:
    """`run` gives a step's result, or None where it must be computed as usual.

    `spare` is the number of a page that no session has. `hidden` is width and type of hidden
    states, None on a first stage. A shape that cannot be recorded ends all recording.
    """

    def __init__(
        self,
        compute: Compute,
        record: Record,
        *,
        page_size: int,
        spare: int,
        hidden: tuple[int, torch.dtype] | None,
        device: torch.device,
        most_context: int,
    ) -> None:
        self._compute, self._record = compute, record
        self._page_size, self._spare, self._hidden = page_size, spare, hidden
        self._device, self._most_pages = device, -(-most_context // page_size)
        self._recorded: dict[Shape, _Recorded] = {}
        self._met: Counter[Shape] = Counter()
        self._broken = False

    def __len__(self) -> int:
        return len(self._recorded)

    def run(self, rows: Sequence[Row]) -> Tensor | None:
        """(len(rows), V) or (len(rows), E)."""
        shape = shape_of(rows, self._page_size, self._most_pages)
        if shape is None or self._broken:
            return None
        recorded = self._recorded.get(shape) or self._new(shape, rows)
        if recorded is None:
            return None
        recorded.fill(rows, self._page_size)
        return recorded.play()[: len(rows)].clone()  # the next step writes there

    def _new(self, shape: Shape, rows: Sequence[Row]) -> _Recorded | None:
        self._met[shape] += 1
        if self._met[shape] < WORTH_IT or len(self._recorded) >= MOST_SHAPES:
            return None
        made = _Recorded(shape, self._hidden, self._spare)
        made.place(self._device)
        made.fill(rows, self._page_size)

        def compute() -> Tensor:
            return self._compute(*made.plan(self._page_size))

        try:
            made.play = self._record(compute)
        except RuntimeError as error:  # something in the model asks the device a question
            log.warning("steps are not recorded on this device: %s", error)
            self._broken = True
            return None
        self._recorded[shape] = made
        return made


def recorder(device: torch.device) -> Record:
    """Records CUDA graphs, which share one pool of memory."""
    pool = torch.cuda.graph_pool_handle()

    def record(compute: Play) -> Play:
        with torch.cuda.device(device):
            aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):  # libraries choose their kernels outside of recordings
                compute()
                compute()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                result = compute()

        def play() -> Tensor:
            with torch.cuda.device(device):
                graph.replay()
            return result

        return play

    return record
