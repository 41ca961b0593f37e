import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shoal.engine.draft import Wish
from shoal.engine.draft_model import (
    CATCH_UP_TOKENS,
    ModelDrafter,
    check_same_tokens,
    load_drafter,
)
from shoal.engine.stage import Stage, StageConfig
from shoal.errors import InvalidRequest, NoCapacity
from shoal.models.checkpoint import BUILTIN, Checkpoint, open_checkpoint
from shoal.models.gguf_checkpoint import GgufCheckpoint
from shoal.models.slice import load_slice
from shoal.units import SessionId

from .test_split_equals_whole import greedy

Tiny = Callable[[str], tuple[Checkpoint, Any]]
ONE, OTHER = SessionId("one"), SessionId("other")


def drafter(tiny: Tiny, pages: int = 64, family: str = "llama") -> ModelDrafter:
    checkpoint, _ = tiny(family)
    stage = Stage(load_slice(checkpoint, checkpoint.whole), StageConfig(page_size=4, pages=pages))
    return ModelDrafter(stage, checkpoint.context_length)


def expected(tiny: Tiny, prompt: Sequence[int], count: int) -> tuple[int, ...]:
    checkpoint, _ = tiny("llama")
    stage = Stage(load_slice(checkpoint, checkpoint.whole), StageConfig(page_size=4, pages=200))
    return tuple(greedy([stage], prompt, count))


def test_a_draft_is_what_the_model_would_say(tiny: Tiny) -> None:
    own, text = drafter(tiny), [5, 17, 99, 3]
    said = expected(tiny, text, 12)
    assert own.draft([Wish(ONE, text, 4), Wish(OTHER, [7, 7], 2)])[0] == said[:4]
    text += said[:5]  # all right and one more
    assert own.draft([Wish(ONE, text, 3)]) == [said[5:8]]
    text += said[5:6]  # accepted in part: the rest is computed anew
    assert own.draft([Wish(OTHER, [7, 7, 9], 1), Wish(ONE, text, 6)])[1] == said[6:12]


def test_after_a_wrong_draft_it_goes_on_from_the_right_token(tiny: Tiny) -> None:
    own, text = drafter(tiny), [5, 17, 99, 3]
    wrong = own.draft([Wish(ONE, text, 3)])[0][0]
    text += [wrong ^ 1, 8]
    assert own.draft([Wish(ONE, text, 3)]) == [expected(tiny, text, 3)]
    assert own.draft([Wish(ONE, text, 3)]) == [expected(tiny, text, 3)], "asked twice"


def test_a_long_prompt_is_read_a_chunk_at_a_time(tiny: Tiny) -> None:
    own, text = drafter(tiny, pages=200), [at % 200 for at in range(2 * CATCH_UP_TOKENS - 100)]
    assert own.draft([Wish(ONE, text, 2), Wish(OTHER, text, 2)]) == [(), ()]
    assert own.draft([Wish(ONE, text, 2)]) == [expected(tiny, text, 2)]


def test_without_room_there_is_no_draft_and_forgotten_sessions_make_room(tiny: Tiny) -> None:
    own = drafter(tiny, pages=3)
    assert own.draft([Wish(ONE, [1, 2, 3, 4, 5], 3), Wish(OTHER, [1] * 3, 2)])[1] == ()
    assert own.draft([Wish(OTHER, [1] * 3, 2)]) == [()]
    own.forget(ONE)
    own.forget(ONE)
    assert len(own.draft([Wish(OTHER, [1] * 3, 2)])[0]) == 2


def test_beyond_its_context_there_is_no_draft(tiny: Tiny) -> None:
    own = drafter(tiny, pages=200)
    assert own.draft([Wish(ONE, [1] * 511, 2)]) == [()]


def test_a_drafter_takes_no_more_memory_than_it_says(tiny: Tiny) -> None:
    checkpoint, _ = tiny("llama")
    own, taken = load_drafter(checkpoint, checkpoint, memory_bytes=1 << 20)
    assert taken < 1 << 20
    assert len(own.draft([Wish(ONE, [1, 2], 2)])[0]) == 2
    with pytest.raises(NoCapacity, match="does not fit"):
        load_drafter(checkpoint, checkpoint, memory_bytes=taken // 2)


def test_a_model_that_cannot_take_back_a_wrong_guess_is_refused(tiny: Tiny) -> None:
    checkpoint, _ = tiny("qwen3_next")
    with pytest.raises(InvalidRequest, match="cannot draft: its running state"):
        load_drafter(checkpoint, checkpoint, memory_bytes=1 << 28)


def test_a_model_with_other_tokens_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    model, _ = tiny("llama")
    with pytest.raises(InvalidRequest, match="cannot draft for"):
        check_same_tokens(replace(model, config={**model.config, "vocab_size": 212}), model)
    builtin = open_checkpoint(BUILTIN)
    with pytest.raises(InvalidRequest, match="their tokens differ"):
        check_same_tokens(builtin, model)
    copy = tmp_path / "copy"
    shutil.copytree(builtin.folder, copy)
    check_same_tokens(open_checkpoint(str(copy)), builtin)


def test_a_gguf_file_is_refused_as_a_draft(tiny: Tiny) -> None:
    model, _ = tiny("llama")
    fields = {name: getattr(model, name) for name in model.__dataclass_fields__}
    with pytest.raises(InvalidRequest, match="GGUF files are only served"):
        load_drafter(GgufCheckpoint(**fields), model, memory_bytes=1 << 30)
