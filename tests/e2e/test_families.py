"""Split over three real processes, two families still write what the unsplit model writes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import httpx
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from shoal.models.random_checkpoint import write_random_checkpoint
from tests.models.families import DENSE, MIXTURES

from .live import live_mesh

pytestmark = pytest.mark.e2e

PROMPT = [5, 17, 99, 3, 42, 120, 7, 8, 9, 200, 11]
TOKENS = 24


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """A word for each id, so that the text of an answer tells its ids."""
    words = {f"t{token}": token for token in range(vocabulary)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Metaspace(replacement=" ", prepend_scheme="never")
    tokenizer.save(str(folder / "tokenizer.json"))


@torch.inference_mode()
def unsplit_text(model: torch.nn.Module) -> list[int]:
    """Greedy ids of transformers' own model, by the whole sequence again for each token.

    Also checks that no two logits are so close that rounding could have chosen between them.
    """
    ids = list(PROMPT)
    for _ in range(TOKENS):
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        first, second = logits.topk(2).values
        assert first - second > 1e-4
        ids.append(int(logits.argmax()))
    return ids[len(PROMPT) :]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_three_processes_write_what_the_unsplit_model_writes(tmp_path: Path, family: str) -> None:
    config = {**DENSE, **MIXTURES}[family]
    folder = tmp_path / family
    model = write_random_checkpoint(config, folder)
    write_tokenizer(folder, config["vocab_size"])
    cuts = pairwise((0, 1, 3, 4))
    slices = [f"{start}:{stop}" for start, stop in cuts]
    with live_mesh(tmp_path / "mesh", slices, "--quant", "none", model=str(folder)) as nodes:
        body = {
            "model": family,
            "prompt": PROMPT,
            "max_tokens": TOKENS,
            "temperature": 0,
            "logprobs": 0,
            "ignore_eos": True,
        }
        answer = httpx.post(f"{nodes[0].api}/v1/completions", json=body, timeout=60).json()
    words = answer["choices"][0]["logprobs"]["tokens"]
    assert [int(word.strip().removeprefix("t")) for word in words] == unsplit_text(model)
