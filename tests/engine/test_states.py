"""Running states: a session's own, from its first token to its end, and never those of another."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from shoal.engine.kv import state_layout
from shoal.engine.rows import Row
from shoal.engine.schedule import plain_logits
from shoal.engine.stage import Stage, StageConfig, pages_for, slots_for
from shoal.engine.states import state_bytes
from shoal.errors import UnsupportedModel
from shoal.models.checkpoint import Checkpoint
from shoal.models.slice import load_slice
from shoal.units import Quant, SessionId, Slice

from ..models.families import HYBRIDS

Tiny = Callable[[str], tuple[Checkpoint, Any]]
PAGE, TEXT = 16, [5 + 7 * at % 200 for at in range(150)]
ONE, TWO, THREE = (SessionId(name) for name in ("one", "two", "three"))


def whole(tiny: Tiny, family: str = "qwen3_next", slots: int = 2) -> Stage:
    checkpoint, _ = tiny(family)
    config = StageConfig(page_size=PAGE, pages=20, slots=slots)
    return Stage(load_slice(checkpoint, checkpoint.whole), config)


def row(session: SessionId, start: int, ids: Sequence[int], draft: Sequence[int] = ()) -> Row:
    pages = range(10) if session == ONE else range(10, 20)
    return Row(session, start, pages, len(ids), ids, draft=draft)


def close(some: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((some - other).abs().max() <= 1e-4 * other.abs().max())


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_long_prompt_in_chunks_gives_what_it_gives_in_one(tiny: Tiny, family: str) -> None:
    """Longer than the chunks of 64 in which the models' own code computes."""
    stage, (_, reference) = whole(tiny, family), tiny(family)
    expected = plain_logits(reference, TEXT)
    assert close(stage.logits([row(ONE, 0, TEXT)], [0])[0], expected[-1])
    at = 0
    for size in (70, 1, 1, 65, 13):
        logits = stage.logits([row(ONE, at, TEXT[at : at + size])], [0])
        at += size
        assert close(logits[0], expected[at - 1])
    assert at == len(TEXT)


def test_a_row_that_does_not_go_on_where_the_state_stands_is_refused(tiny: Tiny) -> None:
    stage = whole(tiny)
    stage.step([row(ONE, 0, TEXT[:5])])
    for wrong in (row(ONE, 4, [1]), row(ONE, 6, [1]), row(TWO, 16, [1])):
        with pytest.raises(ValueError, match="have not read the tokens before"):
            stage.step([wrong])
    with pytest.raises(ValueError, match="cannot take back a draft"):
        stage.step([row(ONE, 5, [1, 2], draft=[2])])
    stage.step([row(ONE, 5, [1])])


def test_a_refused_row_costs_nobody_else_the_state(tiny: Tiny) -> None:
    stage = whole(tiny)
    stage.step([row(ONE, 0, TEXT[:5])])
    with pytest.raises(ValueError, match="have not read"):
        stage.step([row(ONE, 5, [TEXT[5]]), row(TWO, 3, [1])])
    logits = stage.logits([row(ONE, 5, [TEXT[5]])], [0])
    assert close(logits[0], plain_logits(tiny("qwen3_next")[1], TEXT[:6])[-1])


def test_a_forward_that_breaks_off_leaves_no_state_to_go_on_from(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = whole(tiny)
    stage.step([row(ONE, 0, TEXT[:5])])
    head = stage.model.model.base_model.layers[3].mlp

    def breaks(*_: object) -> None:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(head, "forward", breaks)
        with pytest.raises(RuntimeError, match="out of luck"):
            stage.step([row(ONE, 5, [1])])
    with pytest.raises(ValueError, match="have not read"):
        stage.step([row(ONE, 5, [1])])
    stage.step([row(ONE, 0, TEXT[:6])])


def test_the_slot_of_a_session_that_ended_is_anothers_from_the_beginning(tiny: Tiny) -> None:
    stage = whole(tiny)
    fresh = stage.logits([row(TWO, 0, TEXT[:9])], [0])
    stage.step([row(ONE, 0, TEXT[:20])])
    with pytest.raises(ValueError, match="all 2 slots"):
        stage.step([row(THREE, 0, [1])])
    stage.forget(ONE)
    stage.forget(TWO)
    stage.forget(TWO)
    assert torch.equal(stage.logits([row(THREE, 0, TEXT[:9])], [0]), fresh)
    stage.step([row(ONE, 0, [1])])
    with pytest.raises(ValueError, match="all 2 slots"):
        stage.step([row(TWO, 0, [1])])


def test_states_are_set_aside_before_pages(tiny: Tiny) -> None:
    model = whole(tiny).model
    each = state_bytes(state_layout(model))
    conv, recurrent = 4 * (2 * 32 + 64), 4 * 16 * 16  # numbers of one layer
    assert each == 3 * 4 * (conv + recurrent)
    page = 2 * 2 * 16 * 4 * PAGE  # one layer keeps keys and values
    assert slots_for(model, 20 * each) == 5
    assert pages_for(model, 20 * each, PAGE) == 15 * each // page
    assert slots_for(model, each) == 1
    assert slots_for(model, each - 1) == pages_for(model, each - 1) == 0
    assert slots_for(model, 10**12) == 64


def test_where_no_layer_looks_back_pages_take_nothing(tiny: Tiny) -> None:
    model = load_slice(tiny("qwen3_next")[0], Slice(0, 1))
    assert pages_for(model, 10**6) > 10**9
    assert Stage(model).kv_bytes_per_token == 0


def test_models_of_pages_alone_have_no_slots(tiny: Tiny) -> None:
    stage = whole(tiny, "llama")
    assert not stage.keeps_states
    assert slots_for(stage.model, 10**9) == 0
    stage.step([row(ONE, 0, TEXT[:5])])
    stage.step([row(ONE, 4, TEXT[4:6])])
    stage.forget(ONE)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_running_sums_are_refused_in_the_exact_class(tiny: Tiny, kind: Quant) -> None:
    for layers in (Slice(0, 4), Slice(2, 3)):  # also where they are another stage's
        with pytest.raises(UnsupportedModel, match="running sums"):
            load_slice(tiny("qwen3_next")[0], layers, quant=kind)


def test_weights_alone_can_be_rounded(tiny: Tiny) -> None:
    checkpoint, reference = tiny("qwen3_5_text")
    config = StageConfig(page_size=PAGE, pages=10)
    stage = Stage(load_slice(checkpoint, checkpoint.whole, quant="w8"), config)
    logits = stage.logits([row(ONE, 0, TEXT[:5])], [0])[0]
    expected = plain_logits(reference, TEXT[:5])[-1]
    assert (logits - expected).norm() < 0.1 * expected.norm()
