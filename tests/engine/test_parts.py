"""A stage that runs a part of its layers computes what a stage of just these layers computes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.engine.rows import Row
from shoal.engine.schedule import PAGE_SIZE, PAGES, SCHEDULE, Step, make_prompts
from shoal.engine.stage import Stage, StageConfig, StepResult
from shoal.exact import native
from shoal.models.checkpoint import Checkpoint
from shoal.models.slice import load_slice
from shoal.units import Quant, SessionId, Slice

Tiny = Callable[[str], tuple[Checkpoint, Any]]
Parts = Sequence[Slice | None]  # of sessions 0..3

WIDTH = 64
PROMPTS = make_prompts(211)
WHOLE, FIRST, MIDDLE, LAST = Slice(0, 4), Slice(0, 3), Slice(1, 3), Slice(1, 4)
CASES: Sequence[tuple[Slice, Parts]] = (
    (WHOLE, (Slice(0, 2), Slice(2, 4), None, Slice(1, 3))),
    (FIRST, (Slice(1, 2), Slice(0, 3), Slice(0, 1), None)),
    (MIDDLE, (Slice(2, 3), None, Slice(1, 2), Slice(2, 3))),
    (LAST, (None, Slice(3, 4), Slice(1, 2), Slice(2, 4))),
)
every_case = pytest.mark.parametrize(("own", "parts"), CASES)
KINDS: Sequence[tuple[str, Quant]] = (
    ("llama", "int8"),
    ("gemma2", "int4"),
    ("qwen3_moe", "int4"),
    ("deepseek_v3", "int8"),
)


def load(checkpoint: Checkpoint, layers: Slice, quant: Quant = "none", **how: Any) -> Stage:
    config = StageConfig(page_size=PAGE_SIZE, pages=PAGES)
    return Stage(load_slice(checkpoint, layers, None, quant), config, **how)


def pages_of(session: int) -> Sequence[int]:
    """Every fourth page: no neighbours."""
    return range(session, PAGES, len(PROMPTS))


def hidden_of(session: int, start: int, stop: int) -> Tensor:
    """(stop - start, E) as if another stage had computed them."""
    chance = torch.Generator().manual_seed(session)
    return torch.randn(len(PROMPTS[session]), WIDTH, generator=chance)[start:stop]


def row(session: int, start: int, stop: int, part: Slice | None, first: bool) -> Row:
    ids = PROMPTS[session][start:stop] if first else None
    hidden = None if first else hidden_of(session, start, stop)
    name, pages = SessionId(str(session)), pages_of(session)
    return Row(name, start, pages, stop - start, ids, hidden, layers=part)


def rows_of(step: Step, own: Slice, parts: Parts) -> list[Row]:
    firsts = [(part or own).start == 0 for part in parts]
    return [row(s, start, stop, parts[s], firsts[s]) for s, start, stop in step]


def outputs(stage: Stage, rows: Sequence[Row]) -> list[Tensor]:
    """Of each row its hidden states, or the logits after its last token."""
    asked = [index for index, each in enumerate(rows) if not stage.yields(each)]
    result, logits = stage._run(rows, asked)
    hidden = StepResult(result, [])
    found = dict(zip(asked, logits, strict=True))
    return [
        found[index]
        if index in found
        else stage.hidden_from_wire(stage.hidden_to_wire(hidden, rows, [index]), each.count)
        for index, each in enumerate(rows)
    ]


def expected(
    checkpoint: Checkpoint, own: Slice, parts: Parts, quant: Quant, steps: Sequence[Step]
) -> Iterator[list[Tensor]]:
    """From stages that hold just the parts, each row alone."""
    stages = {part: load(checkpoint, part or own, quant) for part in set(parts)}
    for step in steps:
        yield [
            outputs(stages[parts[s]], [replace(each, layers=None)])[0]
            for (s, _, _), each in zip(step, rows_of(step, own, parts), strict=True)
        ]


def check_bits(checkpoint: Checkpoint, own: Slice, parts: Parts, quant: Quant) -> None:
    together, alone = (load(checkpoint, own, quant) for _ in range(2))
    for step, want in zip(SCHEDULE, expected(checkpoint, own, parts, quant, SCHEDULE), strict=True):
        rows = rows_of(step, own, parts)
        assert all(map(torch.equal, outputs(together, rows), want))
        assert all(map(torch.equal, [outputs(alone, [each])[0] for each in rows], want))


@every_case
@pytest.mark.parametrize(("family", "quant"), KINDS)
def test_a_part_has_the_bits_of_a_stage_that_holds_just_that_part(
    tiny: Tiny, family: str, quant: Quant, own: Slice, parts: Parts
) -> None:
    check_bits(tiny(family)[0], own, parts, quant)


@every_case
@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_so_it_has_without_the_compiled_library(
    tiny: Tiny, quant: Quant, own: Slice, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "load", lambda: None)
    check_bits(tiny("qwen3")[0], own, parts, quant)


@every_case
@pytest.mark.parametrize("family", ["llama-tied", "gpt_oss", "deepseek_v2", "qwen3_next"])
def test_a_part_agrees_in_floats(tiny: Tiny, family: str, own: Slice, parts: Parts) -> None:
    checkpoint, forward_only = tiny(family)[0], SCHEDULE[:4]
    stage = load(checkpoint, own)
    want = expected(checkpoint, own, parts, "none", forward_only)
    for step, each in zip(forward_only, want, strict=True):
        for one, other in zip(outputs(stage, rows_of(step, own, parts)), each, strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)
