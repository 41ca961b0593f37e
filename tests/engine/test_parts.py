"""A stage that runs a part of its layers computes what a stage of just these layers computes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.engine.parts import by_part
from shoal.engine.request import Sampling
from shoal.engine.rows import Row
from shoal.engine.sampling import SamplerState
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


def whole(tiny: Tiny, family: str = "llama", quant: Quant = "int8", **how: Any) -> Stage:
    return load(tiny(family)[0], WHOLE, quant, **how)


@pytest.mark.parametrize(("family", "quant"), [("qwen3", "int8"), ("qwen3_next", "none")])
def test_one_stage_can_be_two_stations_of_a_route(tiny: Tiny, family: str, quant: Quant) -> None:
    """Its layers share pages, not keys and values: each part fills those of its own layers."""
    stage, twin = whole(tiny, family, quant), whole(tiny, family, quant)
    for step in SCHEDULE[:4]:
        rows = rows_of(step, WHOLE, [None] * 4)
        head = [replace(each, layers=Slice(0, 1)) for each in rows]
        tail = [
            replace(
                each,
                session=SessionId(f"{each.session}, later"),
                ids=None,
                hidden=hidden,
                layers=Slice(1, 4),
            )
            for each, hidden in zip(rows, outputs(stage, head), strict=True)
        ]
        for one, other in zip(outputs(stage, tail), outputs(twin, rows), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("quant", ["int8", "int4"])
@pytest.mark.parametrize("part", [Slice(2, 4), Slice(0, 4)])
def test_a_draft_is_verified_by_a_part_as_by_a_stage_of_it(
    tiny: Tiny, quant: Quant, part: Slice
) -> None:
    checkpoint, first = tiny("llama")[0], part.start == 0
    small, large = load(checkpoint, part, quant), load(checkpoint, WHOLE, quant)
    for stage, layers in ((small, None), (large, part)):
        stage.step([row(0, 0, 5, layers, first)])
    best = [int(outputs(small, [row(0, at, at + 1, None, first)])[0].argmax()) for at in (5, 6, 7)]
    asked = row(0, 5, 9, part, first)
    state = SamplerState(Sampling(temperature=0), ())
    asked = replace(asked, sampler=state, draft=(*best[:2], best[2] ^ 1))
    rows = [row(1, 0, 4, Slice(0, 2), True), asked, row(2, 0, 3, None, True)]
    sampled = large.step(rows).sampled
    assert [[one.token for one in each] for each in sampled] == [[], best, []]


def test_hidden_states_are_found_between_rows_that_have_none(tiny: Tiny) -> None:
    stage = whole(tiny)
    rows = [
        row(0, 0, 3, None, True),
        row(1, 0, 2, Slice(0, 2), True),
        row(2, 0, 4, Slice(2, 4), False),
        row(3, 0, 5, Slice(1, 3), False),
    ]
    rows[1] = replace(rows[1], sampler=SamplerState(Sampling(), ()))  # has nothing to choose from
    assert [stage.yields(each) for each in rows] == [False, True, False, True]
    result = stage.step(rows)
    assert result.hidden is not None
    assert result.hidden.shape == (7, WIDTH)
    assert result.sampled == [()] * 4
    assert result.hidden.is_contiguous()
    for chosen, first, stop in (([1, 3], 0, 7), ([1], 0, 2), ([3], 2, 7)):
        wire = stage.hidden_to_wire(result, rows, chosen)
        sent = stage.hidden_from_wire(wire, stop - first)
        assert torch.equal(sent, result.hidden[first:stop])
    with pytest.raises(ValueError, match="no hidden states to send"):
        stage.hidden_to_wire(result, rows, [0, 1])


def test_only_parts_of_the_slice_are_run(tiny: Tiny) -> None:
    stage = load(tiny("llama")[0], MIDDLE, "int8")
    for part in (Slice(0, 2), Slice(2, 4), Slice(0, 4), Slice(3, 4)):
        with pytest.raises(ValueError, match=f"layers {part} are not all among 1:3"):
            stage.step([row(0, 0, 2, None, False), row(1, 0, 2, part, False)])
        with pytest.raises(ValueError, match="not all among"):
            stage.model.part(part)


def test_a_row_brings_what_its_part_begins_with(tiny: Tiny) -> None:
    stage = whole(tiny)
    with pytest.raises(ValueError, match="bring hidden states"):
        stage.step([row(0, 0, 3, Slice(1, 4), True)])
    with pytest.raises(ValueError, match="3 tokens announced, 0 given"):
        stage.step([row(0, 0, 3, Slice(0, 2), False)])


@pytest.mark.parametrize(("family", "quant"), [("llama", "int8"), ("qwen3_next", "none")])
def test_a_row_that_is_refused_costs_the_other_parts_nothing(
    tiny: Tiny, family: str, quant: Quant
) -> None:
    """They are computed again, alone, and their samplers have chosen nothing yet."""
    stage, twin = whole(tiny, family, quant), whole(tiny, family, quant)
    state = SamplerState(Sampling(temperature=0), ())
    for each in (stage, twin):
        each.step([row(0, 0, 4, None, True)])
    good = replace(row(0, 4, 5, None, True), sampler=state)
    early = row(1, 3, 4, Slice(1, 4), False)  # what reads states has not read the three before
    for bad in (replace(early, pages=()), *([early] if stage.keeps_states else [])):
        with pytest.raises(ValueError, match=r"do not fit into 0 pages|have not read"):
            stage.step([good, bad])
        assert state.position == 0
    again = replace(good, sampler=SamplerState(Sampling(temperature=0), ()))
    assert stage.step([good]).sampled == twin.step([again]).sampled


def test_both_pieces_of_a_row_that_is_cut_run_its_part() -> None:
    assert [each.layers for each in row(0, 0, 9, MIDDLE, False).cut(4)] == [MIDDLE, MIDDLE]


def test_all_layers_by_name_are_the_whole_slice() -> None:
    rows = [row(0, 0, 1, FIRST, True), row(1, 0, 1, None, True), row(2, 0, 1, MIDDLE, False)]
    assert [(each.layers, each.at) for each in by_part(rows, (), FIRST)] == [
        (FIRST, [0, 1]),
        (MIDDLE, [2]),
    ]


def test_only_steps_of_all_layers_are_played_back(tiny: Tiny) -> None:
    played = 0

    def record(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def play() -> Tensor:
            nonlocal played
            played += 1
            return compute()

        return play

    stage, plain = whole(tiny, record=record), whole(tiny)
    for part, times in ((None, 3), (WHOLE, 8), (Slice(0, 2), 8)):
        for at in range(5):
            rows = [row(s, at, at + 1, part, True) for s in range(2)]
            for one, other in zip(outputs(stage, rows), outputs(plain, rows), strict=True):
                assert torch.equal(one, other)
        assert played == times
