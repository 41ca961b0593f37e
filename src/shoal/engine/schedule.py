"""A fixed schedule of ragged steps and the logits it gives: for proof, tests and benchmarks.

V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..models.checkpoint import Checkpoint
from ..models.slice import load_slice
from ..units import Quant, SessionId, Slice
from .pages import PagePool
from .rows import Row
from .stage import Stage, StageConfig

PAGE_SIZE, PAGES = 4, 48

Step = Sequence[tuple[int, int, int]]  # (session, from token, to token)
PROMPTS = (13, 29, 7, 46)  # tokens of sessions 0..3
SCHEDULE: Sequence[Step] = (
    [(0, 0, 7), (1, 0, 10)],  # a prompt, the first chunk of a longer one
    [(0, 7, 8), (1, 10, 23), (2, 0, 1)],  # a token, a second chunk, a session that joins
    [(0, 8, 9), (1, 23, 24), (2, 1, 2), (3, 0, 40)],  # tokens and a long prompt
    [(1, 24, 25), (2, 2, 3), (3, 40, 41)],  # session 0 has left
    [(0, 9, 13), (3, 41, 44), (1, 25, 26)],  # and is back; another order
    [(0, 12, 13), (3, 44, 45)],  # a token again
    [(2, 0, 5), (3, 45, 46)],  # a session begins anew
    [(2, 5, 6), (3, 0, 1)],
)


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    session: int
    position: int  # of the token that the logits follow
    logits: Tensor  # (V,) float32


def make_prompts(vocab_size: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in PROMPTS
    ]


@torch.inference_mode()
def plain_logits(model: Any, prompt: Sequence[int]) -> Tensor:
    """(tokens, V) of transformers' own forward over the whole text."""
    logits: Tensor = model(torch.tensor([prompt]), use_cache=False).logits[0].float()
    return logits


def make_stages(
    checkpoint: Checkpoint,
    cuts: Sequence[float],
    quant: Quant = "none",
    dtype: str | None = None,
    device: str = "cpu",
) -> list[Stage]:
    """Stages that together hold all layers, cut at these fractions of them."""
    at = [0, *(max(1, round(cut * checkpoint.layers)) for cut in cuts), checkpoint.layers]
    config = StageConfig(page_size=PAGE_SIZE, pages=PAGES)
    return [
        Stage(load_slice(checkpoint, Slice(start, stop), dtype, quant, device), config)
        for start, stop in pairwise(at)
        if start < stop
    ]


def run_schedule(
    stages: Sequence[Stage],
    prompts: Sequence[Sequence[int]],
    only: int | None = None,
) -> list[Answer]:
    """Every row's logits; `only` runs one session alone, in the same chunks. Pages are made to be
    no neighbours.
    """
    pages = _interleaved_pages(len(prompts))
    answers: list[Answer] = []
    for planned in _forward_only() if any(stage.keeps_states for stage in stages) else SCHEDULE:
        step = [each for each in planned if only in (None, each[0])]
        if step:
            answers += _run_step(stages, prompts, pages, step)
    return answers


def _forward_only() -> Iterator[Step]:
    """The schedule without the rows that go back a little, which no running state can."""
    reached: dict[int, int] = {}
    for step in SCHEDULE:
        possible = [each for each in step if each[1] in (0, reached.get(each[0], 0))]
        reached.update({session: stop for session, _, stop in possible})
        yield possible


def _run_step(
    stages: Sequence[Stage],
    prompts: Sequence[Sequence[int]],
    pages: Sequence[Sequence[int]],
    step: Step,
) -> Iterator[Answer]:
    rows = [
        Row(
            SessionId(f"proof {session}"),
            start,
            pages[session],
            stop - start,
            prompts[session][start:stop],
        )
        for session, start, stop in step
    ]
    for stage in stages[:-1]:
        hidden = stage.step(rows).hidden
        assert hidden is not None  # noqa: S101 - no last stage is among them
        parts = torch.split(hidden, [row.count for row in rows])
        rows = [
            Row(row.session, row.start, row.pages, row.count, hidden=part)
            for row, part in zip(rows, parts, strict=True)
        ]
    logits = stages[-1].logits(rows, range(len(rows)))
    return (
        Answer(session, stop - 1, line)
        for (session, _, stop), line in zip(step, logits, strict=True)
    )


def _interleaved_pages(sessions: int) -> list[Sequence[int]]:
    """Session 0 gets neighbours, the others every third page: both ways of reading are proved."""
    pool = PagePool(PAGES, PAGE_SIZE)
    first = pool.allocate(max(PROMPTS))
    rest = pool.allocate(pool.free_tokens)
    return [first, *(rest[index :: sessions - 1] for index in range(sessions - 1))]
