"""Models whose layers keep running states, over a mesh: nothing of a text is left out, taken back
or taken over from another.
"""

import asyncio
from typing import Any

import pytest

from shoal.engine.request import Sampling
from shoal.engine.schedule import plain_logits
from shoal.events import DraftsVerified, PrefixMatched
from shoal.models.checkpoint import Checkpoint, open_checkpoint
from shoal.models.random_checkpoint import write_random_checkpoint
from tests.models.families import HYBRIDS

from .test_mesh import ask, mesh_of, tokens_of

pytestmark = pytest.mark.anyio

REPEATED = (5, 17, 99, 3, 42) * 8  # more than a page of it, and easy to guess
GREEDY = Sampling(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Any]:
    folder = tmp_path_factory.mktemp("qwen3_next")
    reference = write_random_checkpoint(HYBRIDS["qwen3_next"], folder)
    return open_checkpoint(str(folder)), reference


def plain_greedy(model: Any, prompt: tuple[int, ...], tokens: int) -> list[int]:
    text = list(prompt)
    for _ in range(tokens):
        text.append(int(plain_logits(model, text)[-1].argmax()))
    return text[len(prompt) :]


async def test_streams_side_by_side_and_again_are_those_of_transformers(
    hybrid: tuple[Checkpoint, Any],
) -> None:
    checkpoint, reference = hybrid
    prompts = [REPEATED, REPEATED[:7], REPEATED, (9,)]
    expected = [plain_greedy(reference, prompt, 12) for prompt in prompts]
    async with mesh_of(checkpoint, "0:1", "1:3", "3:4") as mesh:
        for _ in range(2):
            streams = [ask(mesh.members[0], GREEDY, prompt) for prompt in prompts]
            assert await asyncio.gather(*map(tokens_of, streams)) == expected
        events = [event for member in mesh.members for event in member.events]
        assert all(e.hit_tokens == 0 for e in events if isinstance(e, PrefixMatched))
        assert not any(isinstance(e, DraftsVerified) for e in events)


async def test_a_session_after_the_last_slot_was_used_finds_one(
    hybrid: tuple[Checkpoint, Any],
) -> None:
    checkpoint, reference = hybrid
    expected = plain_greedy(reference, (9, 8), 3)
    short = Sampling(temperature=0, max_tokens=3)
    async with mesh_of(checkpoint, "0:4") as mesh:
        (worker,) = mesh.members[0].pipeline.workers
        slots = worker.sessions.config.max_sessions
        assert slots == 64
        for _ in range(slots + 2):
            assert await tokens_of(ask(mesh.members[0], short, (9, 8))) == expected
