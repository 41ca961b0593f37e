"""Recorded steps, on a CPU: what a GPU would play back is simply called again."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from shoal.engine.batched_kv import BatchedKv
from shoal.engine.exact_kv import ExactKv
from shoal.engine.graphs import MOST_SHAPES, WORTH_IT, Play, Shape, shape_of
from shoal.engine.kv import kv_layout
from shoal.engine.pages import PagePool
from shoal.engine.rows import Row
from shoal.engine.stage import Stage, StageConfig
from shoal.models.checkpoint import Checkpoint
from shoal.models.slice import load_slice
from shoal.units import Quant, SessionId, Slice

Tiny = Callable[[str], tuple[Checkpoint, Any]]
CONFIG = StageConfig(page_size=4, pages=120)
TEXTS = [
    torch.randint(3, 211, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (9, 30, 17, 5, 61)
]


class Recorder:
    """Counts what is recorded and played."""

    def __init__(self) -> None:
        self.recorded = self.played = 0

    def __call__(self, compute: Play) -> Play:
        self.recorded += 1
        compute()  # as where kernels are chosen first

        def play() -> torch.Tensor:
            self.played += 1
            return compute()

        return play


def row(start: int, pages: Sequence[int] = range(8), count: int = 1) -> Row:
    return Row(SessionId("s"), start, pages, count, [7] * count)


def pages_of_all() -> list[tuple[int, ...]]:
    """Neighbours for the first session, every third page for the others."""
    pool = PagePool(CONFIG.pages, CONFIG.page_size)
    first = pool.allocate(80)
    rest = pool.allocate(pool.free_tokens)
    return [first, *(rest[index::4] for index in range(4))]


def decode(stages: Sequence[Stage], steps: int = 6) -> list[torch.Tensor]:
    """Read all texts, then tokens of ever fewer sessions; (R, V) of each step."""
    pages = pages_of_all()
    found = [
        forward(stages, [Row(SessionId(str(n)), 0, pages[n], len(text), text)])
        for n, text in enumerate(TEXTS)
    ]
    for step in range(steps):
        found.append(
            forward(
                stages,
                [
                    Row(SessionId(str(n)), len(text) + step, pages[n], 1, [text[step % 5] + n])
                    for n, text in enumerate(TEXTS)
                    if step < 4 or n % 2
                ],
            )
        )
    return found


def forward(stages: Sequence[Stage], rows: list[Row]) -> torch.Tensor:
    for stage in stages[:-1]:
        hidden = stage.step(rows).hidden
        assert hidden is not None
        parts = torch.split(hidden, [each.count for each in rows])
        rows = [
            Row(each.session, each.start, each.pages, each.count, hidden=part)
            for each, part in zip(rows, parts, strict=True)
        ]
    return stages[-1].logits(rows, range(len(rows)))


def stages_of(checkpoint: Checkpoint, quant: Quant, record: Recorder | None) -> list[Stage]:
    half = checkpoint.layers // 2
    return [
        Stage(load_slice(checkpoint, Slice(*ends), None, quant), CONFIG, record=record)
        for ends in ((0, half), (half, checkpoint.layers))
    ]


@pytest.mark.parametrize("quant", ["int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_recorded_steps_have_the_bits_of_others_in_the_exact_class(
    tiny: Tiny, family: str, quant: Quant
) -> None:
    checkpoint, record = tiny(family)[0], Recorder()
    recorded = stages_of(checkpoint, quant, record)
    assert all(type(stage._kv) is ExactKv for stage in recorded)
    plain = decode(stages_of(checkpoint, quant, None))
    for one, other in zip(decode(recorded), plain, strict=True):
        assert torch.equal(one, other)
    assert record.recorded == 2  # one shape, in two stages
    assert record.played == 2 * (4 - WORTH_IT + 1)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "deepseek_v2", "gpt_oss"])
def test_recorded_steps_agree_in_floats(tiny: Tiny, family: str) -> None:
    checkpoint, record = tiny(family)[0], Recorder()
    recorded = stages_of(checkpoint, "none", record)
    plain = decode(stages_of(checkpoint, "none", None))
    for one, other in zip(decode(recorded), plain, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)
    mixes = not recorded[1].model.asks_nothing
    assert (record.played > 0) is not mixes


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "deepseek_v2", "gpt_oss"])
def test_rows_that_attend_together_agree_with_rows_that_attend_alone(
    tiny: Tiny, family: str
) -> None:
    """Prompts and single tokens in one step, too."""
    checkpoint = tiny(family)[0]
    stage, plain = (
        Stage(load_slice(checkpoint, checkpoint.whole, None, "none"), CONFIG) for _ in range(2)
    )
    layout = kv_layout(stage.model)
    stage._kv = BatchedKv(layout, CONFIG.pages, CONFIG.page_size, stage.model.device)
    for one, other in zip(decode([stage]), decode([plain]), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)
    pages, text = pages_of_all(), TEXTS[4]
    mixed = [
        Row(SessionId("0"), 15, pages[0], 1, [5]),
        Row(SessionId("4"), 30, pages[4], 9, text[:9]),
        Row(SessionId("1"), 36, pages[1], 1, [6]),
    ]
    every = range(3)
    assert torch.allclose(stage.logits(mixed, every), plain.logits(mixed, every), atol=1e-4)


def test_a_shape_holds_its_rows_and_their_contexts() -> None:
    rows = [row(3), row(900, range(300)), row(5)]
    assert shape_of(rows, 4, 1000) == Shape(4, 256)
    assert shape_of(rows[:1], 4, 1000) == Shape(1, 64)
    assert shape_of(rows, 4, 230) == Shape(4, 230)  # no longer than there are pages
    assert shape_of(rows, 4, 225) is None


def test_what_is_not_a_step_of_single_tokens_is_computed_as_usual() -> None:
    assert shape_of([row(0), row(0, count=2)], 4, 100) is None
    assert shape_of([], 4, 100) is None
    assert shape_of([row(0)] * 33, 4, 100) is None
    assert shape_of([row(32)], 4, 100) is None  # outgrows its pages: it is told so elsewhere


def test_nobody_reads_what_empty_rows_write(tiny: Tiny) -> None:
    checkpoint = tiny("llama")[0]
    stage = Stage(load_slice(checkpoint, checkpoint.whole), CONFIG, record=Recorder())
    ids = [Row(SessionId(str(n)), 0, (n,), 1, [9 + n]) for n in range(3)]
    for _ in range(WORTH_IT):
        stage.logits(ids, range(3))
    pools = [pool for layer in stage._kv._pools.values() for pool in layer]
    used = {slot for pool in pools for slot in pool.flatten(1).any(1).nonzero().flatten().tolist()}
    assert used == {0, 4, 8, CONFIG.pages * CONFIG.page_size}


def test_a_model_that_cannot_be_recorded_is_computed_as_usual(tiny: Tiny) -> None:
    def refuse(compute: Play) -> Play:
        raise RuntimeError("operation not permitted when stream is capturing")

    checkpoint = tiny("llama")[0]
    stage = Stage(load_slice(checkpoint, checkpoint.whole), CONFIG, record=refuse)
    plain = Stage(load_slice(checkpoint, checkpoint.whole), CONFIG)
    for one, other in zip(decode([stage]), decode([plain]), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_there_are_never_too_many_recordings(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MOST_SHAPES < 100
    monkeypatch.setattr("shoal.engine.graphs.MOST_SHAPES", 1)
    record, checkpoint = Recorder(), tiny("llama")[0]
    stage = Stage(load_slice(checkpoint, checkpoint.whole), CONFIG, record=record)
    for count in (1, 2, 3):
        for _ in range(WORTH_IT):
            stage.logits([row(0, (n,)) for n in range(count)], range(count))
    assert record.recorded == 1


def test_only_rows_that_are_asked_for_are_answered(tiny: Tiny) -> None:
    checkpoint = tiny("llama")[0]
    stage = Stage(load_slice(checkpoint, checkpoint.whole), CONFIG, record=Recorder())
    rows = [Row(SessionId(str(n)), 0, (n,), 1, [9 + n]) for n in range(3)]
    for _ in range(WORTH_IT):
        every = stage.logits(rows, range(3))
    assert torch.equal(stage.logits(rows, [2]), every[2:])
