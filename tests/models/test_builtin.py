import ast
import math
import re
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from shoal.models.checkpoint import BUILTIN_FOLDER

HELD_OUT = ("wsgiref/util.py", "xml/sax/__init__.py")  # two small ones of the files held out
CONTEXT_LENGTH = 1024


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BUILTIN_FOLDER)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(BUILTIN_FOLDER)


def greedy(model: Any, tokenizer: Any, prompt: str) -> str:
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        answer = model.generate(ids, max_new_tokens=64, do_sample=False)
    return str(tokenizer.decode(answer[0]))


def is_a_body(text: str) -> bool:
    """One or more whole statements of Python, cut off nowhere in their middle."""
    try:
        return len(ast.parse(text).body) > 0
    except SyntaxError:
        return False


def bits_per_byte(model: Any, tokenizer: Any, text: str) -> float:
    """Of the first window of the text, behind <|endoftext|>."""
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text).input_ids][:CONTEXT_LENGTH]])
    with torch.no_grad():
        logits = model(ids).logits[0, :-1].float()
    nats = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
    return nats / math.log(2) / len(tokenizer.decode(ids[0, 1:]).encode())


def test_the_whole_folder_takes_at_most_twelve_megabytes() -> None:
    assert sum(file.stat().st_size for file in BUILTIN_FOLDER.iterdir()) <= 12_000_000


def test_it_is_a_llama_of_eight_layers_in_bf16(model: Any) -> None:
    assert model.config.model_type == "llama"
    assert model.config.num_hidden_layers == 8
    assert model.config.tie_word_embeddings
    assert model.config.max_position_embeddings == CONTEXT_LENGTH
    assert model.dtype == torch.bfloat16
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(5e6, rel=0.1)


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_from_its_tokens_unchanged(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text


def test_python_indentation_is_one_token_a_line(tokenizer: Any) -> None:
    tokens = tokenizer.tokenize("if n:\n        return n")
    assert tokenizer.convert_tokens_to_string([tokens[3]]) == "\n"
    assert tokenizer.convert_tokens_to_string([tokens[4]]) == " " * 8


def test_the_end_of_a_text_is_one_token_with_the_id_of_the_configuration(
    model: Any, tokenizer: Any
) -> None:
    ends = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    assert ends == {model.config.eos_token_id} == {model.generation_config.eos_token_id}
    assert tokenizer("<|endoftext|>").input_ids == [model.config.eos_token_id]


def test_a_chat_is_the_text_of_its_messages_line_by_line(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "import os"},
        {"role": "user", "content": "def size(path):"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "import os\ndef size(path):\n"


@pytest.mark.parametrize("name", HELD_OUT)
def test_unseen_text_costs_about_what_the_card_claims(
    model: Any, tokenizer: Any, name: str
) -> None:
    card = (BUILTIN_FOLDER / "README.md").read_text()
    claimed = re.search(r"([\d.]+) bits per byte", card)
    assert claimed is not None
    assert 0.5 < float(claimed[1]) < 2.0
    text = (Path(sysconfig.get_path("stdlib")) / name).read_text()
    assert bits_per_byte(model, tokenizer, text) < 1.5 * float(claimed[1])


def test_fibonacci_continues_as_python(model: Any, tokenizer: Any) -> None:
    text = greedy(model, tokenizer, "def fibonacci(n):")
    whole_lines = text.rpartition("\n")[0]
    assert is_a_body(whole_lines) or is_a_body(whole_lines + '\n    """')
