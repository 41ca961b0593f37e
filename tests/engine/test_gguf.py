"""llama.cpp as a slice engine: any cut of a GGUF file computes what the whole file does, and that
is what transformers computes.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shoal.engine.request import Sampling
from shoal.engine.rows import Row
from shoal.engine.stage import StageConfig
from shoal.models.gguf_checkpoint import GgufCheckpoint, open_gguf
from shoal.models.random_checkpoint import write_random_checkpoint
from shoal.units import SessionId, Slice
from tests.models.families import COMMON
from tests.needs import needs

SHAPE = {**COMMON, "rms_norm_eps": 1e-5, "head_dim": 32, "hidden_size": 128}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**SHAPE, "model_type": "llama"},
    "llama-tied": {**SHAPE, "model_type": "llama", "tie_word_embeddings": True},
    "qwen2": {**SHAPE, "model_type": "qwen2"},
    "qwen3": {**SHAPE, "model_type": "qwen3"},
}
CUTS = {"whole": [(0, 4)], "two": [(0, 2), (2, 4)], "three": [(0, 1), (1, 3), (3, 4)]}
PAGE = 16


@pytest.fixture(autouse=True)
def _installed() -> None:
    needs("llama_cpp", "gguf")


def write(tmp_path: Path, family: str, dtype: type = np.float32) -> tuple[GgufCheckpoint, Path]:
    from tests.gguf_files import write_gguf

    folder = tmp_path / family
    write_random_checkpoint(FAMILIES[family], folder, seed=3, shard="1GB")
    return open_gguf(write_gguf(folder, tmp_path / f"{family}.gguf", dtype)), folder


def stages(checkpoint: GgufCheckpoint, cuts: Sequence[tuple[int, int]], pages: int = 40) -> list:
    from shoal.engine.gguf import GgufStage

    config = StageConfig(page_size=PAGE, pages=pages)
    return [GgufStage(checkpoint, Slice(*cut), config, threads=1) for cut in cuts]


class Greedy:
    """A sampler that notes the logits it was shown."""

    def __init__(self, seen: list[torch.Tensor]) -> None:
        from shoal.engine.sampling import SamplerState

        self.state = SamplerState(Sampling(temperature=0, max_tokens=999), ())
        self.seen = seen


def schedule(seed: int, vocabulary: int) -> list[list[tuple[str, int, list[int]]]]:
    """Steps of (session, start, ids): chunks of prompts and single tokens, sessions joining."""
    chance = random.Random(seed)
    filled: dict[str, int] = {}
    steps = []
    for turn in range(6):
        if turn % 2 == 0:
            filled[f"s{turn}"] = 0
        step = []
        for session, at in filled.items():
            count = chance.choice((1, 5, 11)) if at == 0 else 1
            step.append((session, at, [chance.randrange(3, vocabulary) for _ in range(count)]))
            filled[session] = at + count
        steps.append(step)
    return steps


def run(ring: list, steps: list[list[tuple[str, int, list[int]]]]) -> list[torch.Tensor]:
    """Logits of every position of every step."""
    pages = {f"s{turn}": range(3 * turn, 3 * turn + 3) for turn in range(10)}
    out = []
    for step in steps:
        hidden = None
        for stage in ring:
            rows, at = [], 0
            for session, start, ids in step:
                part = None if hidden is None else hidden[at : at + len(ids)]
                own = tuple(ids) if stage.model.first else None
                name = SessionId(session)
                rows.append(Row(name, start, pages[session], len(ids), own, part))
                at += len(ids)
            if stage.model.last:
                out.append(all_logits(stage, rows))
            else:
                result = stage.step(rows)
                wire = stage.hidden_to_wire(result, rows, range(len(rows)))
                hidden = stage.hidden_from_wire(bytes(wire), at)
    return out


def all_logits(stage: Any, rows: list[Row]) -> torch.Tensor:
    x = stage._inputs(rows)
    owners = [s for row in rows for s in [stage._sequences.of(row)] * row.count]
    at = [position for row in rows for position in range(row.start, row.stop)]
    return torch.from_numpy(stage._slice.logits(x, at, owners, range(len(x))))


@pytest.mark.parametrize("cut", ["two", "three"])
@pytest.mark.parametrize("family", FAMILIES)
def test_slices_compute_what_the_whole_file_does(tmp_path: Path, family: str, cut: str) -> None:
    checkpoint, _ = write(tmp_path, family, np.float16)
    for seed in range(3):
        steps = schedule(seed, checkpoint.vocab_size)
        whole = run(stages(checkpoint, CUTS["whole"]), steps)
        sliced = run(stages(checkpoint, CUTS[cut]), steps)
        assert all(torch.equal(a, b) for a, b in zip(whole, sliced, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_gguf_file_computes_what_transformers_does(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint, folder = write(tmp_path, family)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(3, checkpoint.vocab_size, (1, 30), generator=torch.manual_seed(5))
    expected = model(ids).logits[0]
    (got,) = run(stages(checkpoint, CUTS["two"]), [[("s0", 0, ids[0].tolist())]])
    assert (got - expected).abs().max() < 0.01 * expected.std()


def sampled(stage: Any, rows: Sequence[Row]) -> list[list[int]]:
    return [[one.token for one in some] for some in stage.step(rows).sampled]


def row(name: str, start: int, ids: Sequence[int], *, ask: bool = True, page: int = 0, **more):
    from shoal.engine.sampling import SamplerState

    state = SamplerState(Sampling(temperature=0, max_tokens=99), ()) if ask else None
    pages = (page, page + 1)
    return Row(SessionId(name), start, pages, len(ids), tuple(ids), None, state, **more)


def generate(stage: Any, name: str, prompt: list[int], count: int, page: int = 0) -> list[int]:
    ids = list(prompt)
    ((token,),) = sampled(stage, [row(name, 0, ids, page=page)])
    ids.append(token)
    while len(ids) < len(prompt) + count:
        ((token,),) = sampled(stage, [row(name, len(ids) - 1, ids[-1:], page=page)])
        ids.append(token)
    return ids[len(prompt) :]


def test_a_draft_is_verified_in_one_step_and_a_wrong_guess_taken_back(tmp_path: Path) -> None:
    checkpoint, _ = write(tmp_path, "llama")
    (stage,) = stages(checkpoint, CUTS["whole"])
    prompt = [9, 30, 4]
    right = generate(stage, "a", prompt, 6)
    sampled(stage, [row("b", 0, prompt, page=2)])
    wrong = (right[2] + 1) % checkpoint.vocab_size
    draft = (right[1], wrong, right[3])
    guessed = row("b", 3, [right[0], *draft], page=2, draft=draft)
    assert sampled(stage, [guessed]) == [right[1:3]]
    assert sampled(stage, [row("b", 5, right[2:3], page=2)]) == [right[3:4]]


def test_pages_that_come_back_with_another_session_begin_empty(tmp_path: Path) -> None:
    checkpoint, _ = write(tmp_path, "qwen2")
    (stage,) = stages(checkpoint, CUTS["whole"], pages=4)
    alone = [generate(stage, f"first{n}", [n + 3, 17, 40], 5) for n in range(3)]
    for turn in range(9):
        assert (
            generate(stage, f"s{turn}", [turn % 3 + 3, 17, 40], 5, page=turn % 3) == alone[turn % 3]
        )


def test_rows_whose_beginning_is_missing_are_refused_and_harm_nobody(tmp_path: Path) -> None:
    checkpoint, _ = write(tmp_path, "llama")
    (stage,) = stages(checkpoint, CUTS["whole"])
    expected = generate(stage, "a", [9, 30, 4], 4)
    with pytest.raises(ValueError, match="not in the cache"):
        stage.step([row("b", 5, [7], page=2)])
    assert generate(stage, "c", [9, 30, 4], 4) == expected


def test_its_slice_is_run_whole_or_not_at_all(tmp_path: Path) -> None:
    checkpoint, _ = write(tmp_path, "llama")
    (stage,) = stages(checkpoint, CUTS["whole"])
    assert not stage.runs_parts
    with pytest.raises(ValueError, match="all of its layers 0:4 or none"):
        stage.step([row("a", 0, [9, 30], page=2), row("b", 0, [9, 30], layers=Slice(0, 2))])
    named, plain = row("a", 0, [9, 30], layers=Slice(0, 4)), row("b", 0, [9, 30], page=2)
    assert sampled(stage, [named]) == sampled(stage, [plain])


def test_a_prompt_in_progress_asks_for_nothing(tmp_path: Path) -> None:
    checkpoint, _ = write(tmp_path, "llama")
    (stage,) = stages(checkpoint, CUTS["whole"])
    expected = generate(stage, "a", [9, 30, 4, 50], 1)
    assert sampled(stage, [row("b", 0, [9, 30], ask=False, page=2)]) == [[]]
    assert sampled(stage, [row("b", 2, [4, 50], page=2)]) == [expected]


def test_quantised_weights_are_sliced_as_they_lie(tmp_path: Path) -> None:
    """Also an embedding that is quantised: its rows are unpacked by ggml's own function."""
    import llama_cpp

    checkpoint, _ = write(tmp_path, "llama")
    target = tmp_path / "q8.gguf"
    how = llama_cpp.llama_model_quantize_default_params()
    how.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
    paths = (str(path).encode() for path in (checkpoint.gguf.path, target))
    assert llama_cpp.llama_model_quantize(*paths, ctypes.byref(how)) == 0
    small = open_gguf(target)
    assert small.slice_bytes(small.whole) < 0.4 * checkpoint.slice_bytes(checkpoint.whole)
    steps = schedule(1, small.vocab_size)
    whole, sliced = (run(stages(small, CUTS[cut]), steps) for cut in ("whole", "three"))
    assert all(torch.equal(a, b) for a, b in zip(whole, sliced, strict=True))
    exact = run(stages(checkpoint, CUTS["whole"]), steps)
    worst = max(float((a - b).abs().max()) for a, b in zip(exact, sliced, strict=True))
    assert 0 < worst < 0.2 * float(exact[0].std())


def test_nothing_is_left_on_disk_once_a_slice_is_loaded(tmp_path: Path) -> None:
    from shoal.engine.gguf import GgufStage

    checkpoint, _ = write(tmp_path, "llama")
    scratch = tmp_path / "scratch"
    stage = GgufStage(checkpoint, Slice(1, 3), StageConfig(page_size=16, pages=4), scratch=scratch)
    assert list(scratch.iterdir()) == []
    stage.close()
