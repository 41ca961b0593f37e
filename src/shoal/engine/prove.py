"""Proves that an architecture can be cut into stages before one of it is served.

A tiny random model of the same architecture answers the same ragged schedule (chunked prompts,
sessions that join and leave) whole and cut into stages: the logits must agree bit for bit, and with
transformers' own forward to rounding. No family is accepted by hope.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import tempfile
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from .. import __version__
from ..errors import ShoalError, UnsupportedModel
from ..models.checkpoint import Checkpoint, open_checkpoint
from ..models.random_checkpoint import write_random_checkpoint
from ..models.shrink import shrink
from ..models.skeleton import LIBRARY_ERRORS, causal_class, quiet, read_config
from ..models.slice import load_slice
from ..units import Slice
from .pages import PagePool
from .rows import Row
from .stage import Stage, StageConfig

# proved by tests/engine/test_split_equals_whole.py with this minor version of transformers
PROVED = frozenset(
    (
        *(
            "llama",
            "mistral",
            "mixtral",
            "qwen2",
            "qwen3",
            "qwen3_moe",
            "phi3",
            "gemma2",
            "gpt_oss",
        ),
        *("deepseek_v2", "deepseek_v3", "glm4", "glm4_moe", "minimax_m2"),
    )
)
PROVED_WITH = "5.23."
TOLERANCE = 1e-4  # of the largest logit, against the plain forward
PAGE_SIZE, PAGES = 4, 48

Step = Sequence[tuple[int, int, int]]  # (session, from token, to token)
PROMPTS = (13, 29, 7, 46)  # tokens of sessions 0..3
SCHEDULE: Sequence[Step] = (
    [(0, 0, 7), (1, 0, 10)],  # a prompt, the first chunk of a longer one
    [(0, 7, 8), (1, 10, 23), (2, 0, 1)],  # a token, a second chunk, a session that joins
    [(0, 8, 9), (1, 23, 24), (2, 1, 2), (3, 0, 40)],  # tokens and a long prompt
    [(1, 24, 25), (2, 2, 3), (3, 40, 41)],  # session 0 has left
    [(0, 9, 13), (3, 41, 44), (1, 25, 26)],  # and is back; another order
    [(0, 12, 13), (3, 44, 45)],  # a token again
)
CUTS: Sequence[Sequence[float]] = ((0.5,), (0.25, 0.75))  # two stages, three stages


def prove(checkpoint: Checkpoint, cache_dir: Path | None = None) -> None:
    """Raises UnsupportedModel, saying what is missing, unless this architecture passes. Seconds,
    then cached.
    """
    with quiet():
        causal_class(read_config(checkpoint.config))
    if checkpoint.model_type in PROVED and _transformers().startswith(PROVED_WITH):
        return
    tiny = shrink(checkpoint.config)
    note = cache_dir / f"{_key(tiny)}.json" if cache_dir is not None else None
    failure = _remembered(note)
    if failure is None:
        failure = why_not(tiny)
        _remember(note, failure)
    if failure:
        what = f"models of type {checkpoint.model_type} cannot be served yet"
        raise UnsupportedModel(
            failure if failure.startswith(what) else f"{what}: {failure}",
            hint="only architectures whose stages compute just what the whole does are served",
        )


def why_not(config: dict[str, Any]) -> str:
    """Run the proof on this (tiny) configuration; "" when it holds, else what went wrong."""
    with tempfile.TemporaryDirectory(prefix="shoal-proof-") as folder:
        try:
            return _compare(config, Path(folder))
        except ShoalError as error:
            return error.message
        except LIBRARY_ERRORS as error:
            return f"a tiny copy fails with {type(error).__name__}: {error}"


def _compare(config: dict[str, Any], folder: Path) -> str:
    reference = write_random_checkpoint(config, folder)
    checkpoint = open_checkpoint(str(folder))
    prompts = make_prompts(checkpoint.vocab_size)
    with quiet():
        plain = [plain_logits(reference, prompt) for prompt in prompts]
    whole = run_schedule(make_stages(checkpoint, ()), prompts)
    for answer in whole:
        expected = plain[answer.session][answer.position]
        error = (answer.logits - expected).abs().max() / expected.abs().max()
        if not error <= TOLERANCE:
            return f"its logits differ from the plain model's by {error:.1e} of their size"
    for cuts in CUTS:
        stages = make_stages(checkpoint, cuts)
        for one, other in zip(whole, run_schedule(stages, prompts), strict=True):
            if not torch.equal(one.logits, other.logits):
                return f"its logits change when it is cut into {len(stages)} stages"
    return ""


# ---- running a schedule; tests and benchmarks use it, too


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    session: int
    position: int  # of the token that the logits follow
    logits: Tensor  # (V,) float32


def make_prompts(vocab_size: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in PROMPTS
    ]


@torch.inference_mode()
def plain_logits(model: Any, prompt: Sequence[int]) -> Tensor:
    """(tokens, V) of transformers' own forward over the whole text."""
    logits: Tensor = model(torch.tensor([prompt]), use_cache=False).logits[0].float()
    return logits


def make_stages(checkpoint: Checkpoint, cuts: Sequence[float], quant: Any = "none") -> list[Stage]:
    """Stages that together hold all layers, cut at these fractions of them."""
    at = [0, *(max(1, round(cut * checkpoint.layers)) for cut in cuts), checkpoint.layers]
    config = StageConfig(page_size=PAGE_SIZE, pages=PAGES)
    return [
        Stage(load_slice(checkpoint, Slice(start, stop), quant=quant), config)
        for start, stop in pairwise(at)
        if start < stop
    ]


def run_schedule(
    stages: Sequence[Stage],
    prompts: Sequence[Sequence[int]],
    only: int | None = None,
) -> list[Answer]:
    """Every row's logits; `only` runs one session alone, in the same chunks. Pages are made to be
    no neighbours.
    """
    pages = _interleaved_pages(len(prompts))
    answers: list[Answer] = []
    for planned in SCHEDULE:
        step = [each for each in planned if only in (None, each[0])]
        if step:
            answers += _run_step(stages, prompts, pages, step)
    return answers


def _run_step(
    stages: Sequence[Stage],
    prompts: Sequence[Sequence[int]],
    pages: Sequence[Sequence[int]],
    step: Step,
) -> Iterator[Answer]:
    rows = [
        Row(session, start, pages[session], stop - start, prompts[session][start:stop])
        for session, start, stop in step
    ]
    for stage in stages[:-1]:
        hidden = stage.step(rows).hidden
        assert hidden is not None  # noqa: S101 - no last stage is among them
        parts = torch.split(hidden, [row.count for row in rows])
        rows = [
            Row(row.session, row.start, row.pages, row.count, hidden=part)
            for row, part in zip(rows, parts, strict=True)
        ]
    logits = stages[-1].logits(rows, range(len(rows)))
    return (
        Answer(session, stop - 1, line)
        for (session, _, stop), line in zip(step, logits, strict=True)
    )


def _interleaved_pages(sessions: int) -> list[Sequence[int]]:
    """Session 0 gets neighbours, the others every third page: both ways of reading are proved."""
    pool = PagePool(PAGES, PAGE_SIZE)
    first = pool.allocate(max(PROMPTS))
    rest = pool.allocate(pool.free_tokens)
    return [first, *(rest[index :: sessions - 1] for index in range(sessions - 1))]


# ---- remembering


def _transformers() -> str:
    return importlib.metadata.version("transformers")


def _key(config: dict[str, Any]) -> str:
    """One proof for an architecture with these mechanisms and these versions of everything that
    computes it.
    """
    about: dict[Hashable, Any] = {
        "config": config,
        "transformers": _transformers(),
        "torch": torch.__version__,
        "shoal": __version__,
    }
    digest = hashlib.sha256(msgspec.json.encode(about, order="sorted")).hexdigest()
    return f"{config['model_type']}-{digest[:16]}"


def _remembered(note: Path | None) -> str | None:
    if note is None or not note.is_file():
        return None
    try:
        return msgspec.json.decode(note.read_bytes(), type=dict[str, str])["failure"]
    except (msgspec.DecodeError, msgspec.ValidationError, KeyError):
        return None


def _remember(note: Path | None, failure: str) -> None:
    if note is not None:
        note.parent.mkdir(parents=True, exist_ok=True)
        draft = note.with_suffix(f".{os.getpid()}")
        draft.write_bytes(msgspec.json.encode({"failure": failure}))
        draft.replace(note)
