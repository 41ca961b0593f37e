"""The exact class: one result for a token, however, where and in what chunks it is computed."""

import pytest
import torch

from shoal.engine.pages import PagePool
from shoal.engine.rows import Row
from shoal.engine.schedule import Answer, make_prompts, make_stages, run_schedule
from shoal.engine.stage import Stage
from shoal.exact import native
from shoal.models.checkpoint import Checkpoint, open_checkpoint
from shoal.models.random_checkpoint import write_random_checkpoint
from shoal.units import Quant, SessionId
from tests.models.families import FAMILIES

KINDS: tuple[Quant, ...] = ("int8", "int4")


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    folder = tmp_path_factory.mktemp(request.param)
    write_random_checkpoint(FAMILIES[request.param], folder)
    return open_checkpoint(str(folder))


@pytest.fixture
def compiled() -> None:
    if native.load() is None:
        pytest.skip("no compiled library: there is no C++ compiler here")


def same(some: list[Answer], others: list[Answer]) -> bool:
    return all(torch.equal(a.logits, b.logits) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("compiled")
def test_compiled_stages_compute_the_bits_of_plain_torch_in_one_piece(
    checkpoint: Checkpoint, kind: Quant, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = make_prompts(checkpoint.vocab_size)
    found = run_schedule(make_stages(checkpoint, (0.5,), kind), prompts)
    monkeypatch.setattr(native, "load", lambda: None)
    assert same(found, run_schedule(make_stages(checkpoint, (), kind), prompts))


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_alone_has_the_bits_it_has_among_others(
    checkpoint: Checkpoint, kind: Quant
) -> None:
    prompts = make_prompts(checkpoint.vocab_size)
    stages = make_stages(checkpoint, (), kind)
    among_others = run_schedule(stages, prompts)
    for session in range(len(prompts)):
        theirs = [answer for answer in among_others if answer.session == session]
        assert same(theirs, run_schedule(stages, prompts, only=session))


@pytest.mark.parametrize("kind", KINDS)
def test_the_chunks_of_a_prompt_do_not_matter(checkpoint: Checkpoint, kind: Quant) -> None:
    """So a stage that computes a prompt and an answer anew goes on with the very same text."""
    (stage,) = make_stages(checkpoint, (), kind)
    prompt = make_prompts(checkpoint.vocab_size)[-1]
    at_once = logits_after(stage, prompt, [len(prompt)])
    assert torch.equal(logits_after(stage, prompt, [1] * len(prompt)), at_once)
    assert torch.equal(logits_after(stage, prompt, [7, 1, 20, len(prompt) - 28]), at_once)


def logits_after(stage: Stage, prompt: list[int], counts: list[int]) -> torch.Tensor:
    pages = PagePool(stage.config.pages, stage.config.page_size).allocate(len(prompt))
    start = 0
    for count in counts:
        ids = prompt[start : start + count]
        logits = stage.logits([Row(SessionId("alone"), start, pages, count, ids)], [0])
        start += count
    return logits
