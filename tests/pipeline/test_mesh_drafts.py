"""Drafts in whole pipelines: real models, links with delay and loss."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.engine.draft import NgramDrafter, Wish
from shoal.engine.request import Sampled, Sampling
from shoal.errors import InvalidRequest
from shoal.events import DraftsVerified
from shoal.models.checkpoint import Checkpoint
from shoal.models.random_checkpoint import write_random_checkpoint
from shoal.pipeline import Request
from shoal.pipeline.loading import ServingConfig, make_drafter
from shoal.units import SessionId
from tests.models.families import DENSE

from .test_mesh import PROMPT, Member, Mesh, ask, checkpoint, mesh_of, tokens_of

__all__ = ["checkpoint"]
pytestmark = pytest.mark.anyio

DRAWN = Sampling(temperature=0.7, seed=4, max_tokens=24, logprobs=1, repetition_penalty=1.1)


async def sampled(member: Member, prompt: tuple[int, ...], sampling: Sampling) -> list[Sampled]:
    request = Request("tiny", prompt, sampling)
    return [one async for one in member.pipeline.gateway.generate(request)]


def verified(mesh: Mesh) -> tuple[int, int]:
    """Tokens that were drafted and accepted, on all last stages."""
    seen = [e for member in mesh.members for e in member.events if isinstance(e, DraftsVerified)]
    return sum(each.drafted for each in seen), sum(each.accepted for each in seen)


async def test_a_text_that_comes_again_is_guessed_and_the_same_with_its_logprobs(
    checkpoint: Checkpoint,
) -> None:
    async with mesh_of(checkpoint, "0:4", quant="int8", draft="none") as mesh:
        said = await sampled(mesh.members[0], PROMPT, Sampling(temperature=0, max_tokens=24))
        prompt = (*PROMPT, *(one.token for one in said), *PROMPT)
        plain = [
            await sampled(mesh.members[0], prompt, sampling)
            for sampling in (Sampling(temperature=0, max_tokens=24, logprobs=2), DRAWN)
        ]
        assert verified(mesh) == (0, 0)
    async with mesh_of(checkpoint, "0:1", "1:3", "3:4", "", quant="int8") as mesh:
        for member in (mesh.members[0], mesh.members[3]):
            again = [
                await sampled(member, prompt, sampling)
                for sampling in (Sampling(temperature=0, max_tokens=24, logprobs=2), DRAWN)
            ]
            assert again == plain
        assert verified(mesh)[0] > 0


async def test_a_draft_model_is_mostly_right_about_itself(checkpoint: Checkpoint) -> None:
    async with mesh_of(checkpoint, "0:4", draft="none") as mesh:
        plain = await tokens_of(ask(mesh.members[0]))
    async with mesh_of(checkpoint, "0:2", "2:4", draft=str(checkpoint.folder)) as mesh:
        assert await tokens_of(ask(mesh.members[1])) == plain
        drafted, accepted = verified(mesh)
        assert accepted == drafted >= 12


async def test_a_draft_model_with_other_tokens_is_refused_when_the_stage_is_loaded(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    write_random_checkpoint({**DENSE["llama"], "vocab_size": 97}, tmp_path)
    with pytest.raises(InvalidRequest, match="their tokens differ"):
        async with mesh_of(checkpoint, "0:4", draft=str(tmp_path)):
            raise AssertionError("it served")
    async with mesh_of(checkpoint, "2:4", draft=str(tmp_path)) as mesh:
        assert mesh.members[0].serving.slices, "who holds no first layers needs no draft"


class Stumbling(NgramDrafter):
    """Fails every other time; remembers whom it was told to forget."""

    def __init__(self, quick: bool) -> None:
        super().__init__()
        self._quick, self.calls = quick, 0
        self.forgotten: list[SessionId] = []

    def is_quick(self, wishes: Sequence[Wish]) -> bool:
        return self._quick

    def draft(self, wishes: Sequence[Wish]) -> list[tuple[int, ...]]:
        self.calls += 1
        if self.calls % 2:
            raise RuntimeError("it stumbled")
        return [(5,) * wish.count for wish in wishes]

    def forget(self, session: SessionId) -> None:
        self.forgotten.append(session)


@pytest.mark.parametrize("quick", [True, False])
async def test_a_drafter_that_fails_costs_its_drafts_and_hears_of_sessions_that_are_over(
    checkpoint: Checkpoint, quick: bool
) -> None:
    async with mesh_of(checkpoint, "0:2", "2:4", quant="int8", draft="none") as mesh:
        plain = await tokens_of(ask(mesh.members[1]))
        drafter = Stumbling(quick)
        mesh.members[0].pipeline.workers[0].guess_with(drafter)
        for _ in range(2):
            assert await tokens_of(ask(mesh.members[1])) == plain
        assert drafter.calls > 2
        assert drafter.forgotten


async def test_a_model_that_cannot_rewind_is_served_without_drafts(checkpoint: Checkpoint) -> None:
    config = {**checkpoint.config, "layer_types": ["linear_attention"] * 4}
    stateful = replace(checkpoint, config=config)
    assert make_drafter(stateful, stateful.whole, ServingConfig(memory_bytes=1)) == (None, 0)
    drafter, taken = make_drafter(checkpoint, checkpoint.whole, ServingConfig(memory_bytes=1))
    assert (drafter is not None, taken) == (True, 0)
