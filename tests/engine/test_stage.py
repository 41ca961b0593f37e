from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from shoal.engine.request import Sampling
from shoal.engine.rows import Row
from shoal.engine.sampling import SamplerState
from shoal.engine.stage import Stage, StageConfig, pages_for
from shoal.errors import NoCapacity
from shoal.models.checkpoint import Checkpoint
from shoal.models.slice import load_slice
from shoal.units import SessionId, Slice

Tiny = Callable[[str], tuple[Checkpoint, Any]]
SMALL = StageConfig(page_size=4, pages=8)


def row(start: int, ids: Sequence[int], *, pages: Sequence[int] = (0, 1), ask: bool = False) -> Row:
    sampler = SamplerState(Sampling(temperature=0), ()) if ask else None
    return Row(SessionId("s"), start, pages, len(ids), ids, sampler=sampler)


def whole(tiny: Tiny, family: str = "llama") -> Stage:
    checkpoint, _ = tiny(family)
    return Stage(load_slice(checkpoint, checkpoint.whole), SMALL)


def test_only_rows_that_ask_get_a_token(tiny: Tiny) -> None:
    stage = whole(tiny)
    result = stage.step([row(0, [5, 6, 7], ask=True), row(0, [8], pages=(2,))])
    assert result.hidden is None
    asked, silent = result.sampled
    assert len(asked) == 1
    assert silent == ()
    assert stage.step([row(3, [9])]).sampled == [()]


def test_a_row_with_a_draft_gives_the_tokens_that_came_one_by_one(tiny: Tiny) -> None:
    stage, prompt, said = whole(tiny), [5, 6, 7], list[int]()
    state = SamplerState(Sampling(temperature=0), prompt)
    ids, at = prompt, 0
    while len(said) < 5:
        ((chosen,),) = stage.step(
            [Row(SessionId("s"), at, (0, 1), len(ids), ids, None, state)]
        ).sampled
        at, ids = at + len(ids), [chosen.token]
        said.append(chosen.token)
    drafts = ((said[1:4], said[1:5]), ([said[1], 96, said[3]], said[1:3]), ([96], said[1:2]))
    for draft, expected in drafts:
        state = SamplerState(Sampling(temperature=0), prompt, said[:1])
        ids = [said[0], *draft]
        asked = Row(SessionId("s"), 3, (0, 1), len(ids), ids, None, state, draft)
        _, chosen = stage.step([row(0, [8], pages=(2,), ask=True), asked]).sampled
        assert [one.token for one in chosen] == expected


def test_the_head_is_not_computed_for_prompts_in_progress(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = whole(tiny)

    def forbidden(*_: object) -> None:
        raise AssertionError("the head was used")

    monkeypatch.setattr(stage.model.model.lm_head, "forward", forbidden)
    assert stage.step([row(0, [5, 6, 7])]).sampled == [()]


def test_a_first_stage_hands_on_the_hidden_states_of_all_rows(tiny: Tiny) -> None:
    checkpoint, _ = tiny("llama")
    stage = Stage(load_slice(checkpoint, Slice(0, 2)), SMALL)
    rows = [row(0, [5, 6, 7]), row(0, [8], pages=(2,)), row(0, [9, 9], pages=(3,))]
    result = stage.step(rows)
    assert result.hidden is not None
    assert result.hidden.shape == (6, 64)
    assert result.hidden.is_contiguous()
    assert result.sampled == [()] * 3
    some = stage.hidden_from_wire(stage.hidden_to_wire(result, rows, [0, 2]), 5)
    assert torch.equal(some, result.hidden[[0, 1, 2, 4, 5]])


@pytest.mark.parametrize("bad", [row(6, [1, 2, 3]), row(-1, [1]), row(0, [])])
def test_a_row_that_does_not_fit_its_pages_is_refused(tiny: Tiny, bad: Row) -> None:
    with pytest.raises(ValueError, match="do not fit into 2 pages"):
        whole(tiny).step([bad])


def test_a_row_with_fewer_ids_than_announced_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="3 tokens announced, 2 given"):
        whole(tiny).step([Row(SessionId("s"), 0, (0,), 3, [1, 2])])


def test_the_pages_of_one_session_do_not_touch_those_of_another(tiny: Tiny) -> None:
    stage = whole(tiny)
    first = stage.logits([row(0, [5, 6, 7]), row(0, [7, 7], pages=(4,))], [0])
    stage.step([row(0, [9] * 8, pages=(2, 3)), row(0, [3] * 4, pages=(5,))])
    again = stage.logits([row(2, [7])], [0])
    alone = whole(tiny)
    alone.step([row(0, [5, 6])])
    assert torch.allclose(first, again, atol=1e-5)
    assert torch.allclose(alone.logits([row(2, [7])], [0]), again, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "floats"), [("llama", 2 * 2 * 16), ("qwen3", 2 * 2 * 32), ("deepseek_v3", 16 + 16)]
)
def test_the_cache_takes_what_the_layers_really_keep(tiny: Tiny, family: str, floats: int) -> None:
    """GQA keeps kv heads, MLA just its latents: 4 layers of float32."""
    stage = whole(tiny, family)
    assert stage.kv_bytes_per_token == 4 * 4 * floats
    assert pages_for(stage.model, 10 * 16 * stage.kv_bytes_per_token, 16) == 10
    assert pages_for(stage.model, 16 * stage.kv_bytes_per_token - 1, 16) == 0


def test_a_cache_that_no_machine_can_hold_is_refused(tiny: Tiny) -> None:
    checkpoint, _ = tiny("llama")
    with pytest.raises(NoCapacity, match="no memory for"):
        Stage(load_slice(checkpoint, Slice(0, 1)), StageConfig(page_size=16, pages=1 << 50))
