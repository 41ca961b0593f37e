"""What becomes of a grammar on its way to the last stage."""

from __future__ import annotations

import pytest

from shoal.engine.request import Grammar, Sampling
from shoal.errors import InvalidRequest
from shoal.models.checkpoint import Checkpoint

from .test_mesh import ask, checkpoint, mesh_of, tokens_of, unsplit

__all__ = ["checkpoint"]  # the fixture

pytestmark = pytest.mark.anyio


async def test_a_stage_that_cannot_keep_a_grammar_says_so_and_serves_on(
    checkpoint: Checkpoint,
) -> None:
    """This checkpoint has no tokenizer: its last stage knows ids, not what they say."""
    async with mesh_of(checkpoint, "0:2", "2:4", "") as mesh:
        held = Sampling(grammar=Grammar("json_object"), max_tokens=4)
        for member in mesh.members:
            with pytest.raises(InvalidRequest, match=r"tokenizer\.json") as refused:
                await tokens_of(ask(member, held))
            assert refused.value.http_status == 400
        assert await tokens_of(ask(mesh.members[2])) == await unsplit(checkpoint)
