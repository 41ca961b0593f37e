"""Invariant 1 in the exact class, for every family: a token's bits depend on its text alone."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from shoal.engine.rows import Row
from shoal.engine.schedule import PAGE_SIZE, make_prompts, make_stages, plain_logits, run_schedule
from shoal.engine.stage import Stage
from shoal.exact import native
from shoal.models.checkpoint import Checkpoint
from shoal.units import Quant, SessionId

from ..models.families import FAMILIES

Tiny = Callable[[str], tuple[Checkpoint, Any]]
PROMPTS = make_prompts(211)
KINDS: tuple[Quant, ...] = ("int8", "int4")
every_family = pytest.mark.parametrize("family", FAMILIES)
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_family
@every_kind
def test_a_request_alone_has_the_bits_it_has_among_others(
    tiny: Tiny, family: str, kind: Quant
) -> None:
    stages = make_stages(tiny(family)[0], (0.5,), kind)
    together = run_schedule(stages, PROMPTS)
    for session in range(len(PROMPTS)):
        alone = run_schedule(stages, PROMPTS, only=session)
        mine = [answer for answer in together if answer.session == session]
        pairs = zip(alone, mine, strict=True)
        assert all(torch.equal(one.logits, other.logits) for one, other in pairs)


def logits_by_cut(stage: Stage, ids: Sequence[int], cuts: Sequence[int]) -> Iterator[torch.Tensor]:
    """The logits after each chunk of a text."""
    pages = range(-(-len(ids) // PAGE_SIZE))
    for start, stop in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        row = Row(SessionId("s"), start, pages, stop - start, ids[start:stop])
        yield stage.logits([row], [0])[0]


@every_family
def test_a_prompt_has_the_same_bits_however_it_is_cut(tiny: Tiny, family: str) -> None:
    (stage,) = make_stages(tiny(family)[0], (), "int8")
    ids = PROMPTS[1]
    token_by_token = list(logits_by_cut(stage, ids, range(1, len(ids))))
    for cuts in ([], [1], [16], [5, 6, 20]):
        for stop, logits in zip([*cuts, len(ids)], logits_by_cut(stage, ids, cuts), strict=True):
            assert torch.equal(logits, token_by_token[stop - 1])


@every_family
@every_kind
def test_without_the_compiled_library_the_bits_are_the_same(
    tiny: Tiny, family: str, kind: Quant, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, _ = tiny(family)
    expected = run_schedule(make_stages(checkpoint, (), kind), PROMPTS)
    monkeypatch.setattr(native, "load", lambda: None)
    plain = run_schedule(make_stages(checkpoint, (), kind), PROMPTS)
    pairs = zip(plain, expected, strict=True)
    assert all(torch.equal(one.logits, other.logits) for one, other in pairs)


@every_family
def test_the_logits_are_near_those_of_the_float_model(tiny: Tiny, family: str) -> None:
    checkpoint, reference = tiny(family)
    errors = []
    for answer in run_schedule(make_stages(checkpoint, (), "int8"), PROMPTS):
        expected = plain_logits(reference, PROMPTS[answer.session])[answer.position]
        errors.append((answer.logits - expected).norm() / expected.norm())
    assert torch.stack(errors).median() < 0.1  # single tokens may change their experts
