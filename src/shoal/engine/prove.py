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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from .. import __version__
from ..errors import ShoalError, UnsupportedModel
from ..models.checkpoint import Checkpoint, open_checkpoint
from ..models.random_checkpoint import write_random_checkpoint
from ..models.shrink import shrink
from ..models.skeleton import LIBRARY_ERRORS, causal_class, quiet, read_config
from .schedule import make_prompts, make_stages, plain_logits, run_schedule

# proved by tests/engine/test_split_equals_whole.py with this minor version of transformers
PROVED = frozenset(
    "llama mistral mixtral qwen2 qwen3 qwen3_moe phi3 gemma2 gpt_oss deepseek_v2 deepseek_v3 glm4"  # noqa: SIM905
    " glm4_moe minimax_m2 qwen3_next qwen3_5_text qwen3_5_moe_text olmo_hybrid kimi_linear lfm2"
    " lfm2_moe granitemoehybrid bamba falcon_h1".split()
)
PROVED_WITH = "5.23."
TOLERANCE = 1e-4  # of the largest logit, against the plain forward
CUTS: Sequence[Sequence[float]] = ((0.5,), (0.25, 0.75))  # two stages, three stages


def prove(checkpoint: Checkpoint, cache_dir: Path | None = None) -> None:
    """Raises UnsupportedModel, saying what is missing, unless this architecture passes.

    Takes seconds; the verdict is kept in `cache_dir` for this configuration and these versions.
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


# ---- remembering


def _transformers() -> str:
    return importlib.metadata.version("transformers")


def _key(config: dict[str, Any]) -> str:
    """One proof for an architecture with these mechanisms and these versions of everything that
    computes it.
    """
    about: dict[str, Any] = {
        "config": config,
        "transformers": _transformers(),
        "torch": str(torch.__version__),
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
