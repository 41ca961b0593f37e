"""The tokenizer rebuilt from a GGUF file cuts text as llama.cpp does with the same file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.errors import UnsupportedModel
from shoal.models.checkpoint import BUILTIN_FOLDER
from shoal.models.gguf_file import read_gguf
from shoal.models.gguf_text import gguf_tokenizer
from shoal.models.text import Tokenizer
from tests.needs import needs

PRES = ("llama-bpe", "qwen2", "gpt-2", "smollm")
TEXTS = st.text(st.characters(blacklist_categories=("Cs", "Cn", "Co")), max_size=60)
WORDS = st.lists(
    st.sampled_from(
        ["The", " don't", "I'LL", " 12345", "\n\n", "\t", "  ", "é", " naïve", "€", "!?"]
    ),
    max_size=12,
).map("".join)
relaxed = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    needs("gguf")
    from tests.gguf_files import write_gguf, write_sentencepiece

    folder, known = tmp_path_factory.mktemp("gguf"), {}

    def file(pre: str) -> Path:
        if pre not in known:
            path = folder / f"{pre}.gguf"
            make = write_sentencepiece if pre == "spm" else write_gguf
            more = {} if pre == "spm" else {"pre": pre}
            known[pre] = make(*(() if pre == "spm" else (BUILTIN_FOLDER,)), path, **more)
        return known[pre]

    return file


@contextmanager
def llama_vocabulary(path: Path) -> Iterator[Callable[[str], list[int]]]:
    """llama.cpp's own way from text to ids."""
    needs("llama_cpp")
    from shoal.engine.llama_library import llama_library

    api: Any = llama_library().api
    how = api.llama_model_default_params()
    how.vocab_only = True
    model = api.llama_model_load_from_file(str(path).encode(), how)
    assert model
    vocabulary = api.llama_model_get_vocab(model)

    def ids(text: str) -> list[int]:
        data = text.encode()
        room = (api.llama_token * (len(data) + 16))()
        count = api.llama_tokenize(vocabulary, data, len(data), room, len(room), True, False)
        assert count >= 0
        return list(room[:count])

    yield ids
    api.llama_model_free(model)


@pytest.mark.parametrize("pre", [*PRES, "spm"])
@relaxed
@given(st.one_of(TEXTS, WORDS))
def test_text_becomes_the_ids_of_llama_cpp(
    written: Callable[[str], Path], pre: str, text: str
) -> None:
    tokenizer, ids_of = _both(written(pre))
    ids = ids_of(text)
    assert tokenizer.encode(text) == ids
    if "\x00" not in text:
        assert tokenizer.decode(ids) == text


_open: dict[Path, Any] = {}


def _both(path: Path) -> tuple[Tokenizer, Callable[[str], list[int]]]:
    if path not in _open:
        opened = llama_vocabulary(path)
        _open[path] = (gguf_tokenizer(read_gguf(path)), opened.__enter__(), opened)
    return _open[path][:2]


def test_special_tokens_ends_and_the_template_are_there(written: Callable[[str], Path]) -> None:
    tokenizer = gguf_tokenizer(read_gguf(written("qwen2")))
    original = Tokenizer.open(BUILTIN_FOLDER)
    assert tokenizer.eos_ids == original.eos_ids == (0,)
    assert tokenizer.special["bos_token"] == "<|endoftext|>"
    messages = [{"role": "user", "content": "import os"}]
    assert tokenizer.render_chat(messages) == original.render_chat(messages)
    assert tokenizer.encode("<|endoftext|>x", add_special=False)[0] == 0


def test_an_unknown_way_of_cutting_is_refused_unless_the_tokenizer_lies_beside(
    written: Callable[[str], Path], tmp_path: Path
) -> None:
    content = written("qwen2").read_bytes().replace(b"qwen2", b"qwenX")
    (tmp_path / "x.gguf").write_bytes(content)
    file = read_gguf(tmp_path / "x.gguf")
    with pytest.raises(UnsupportedModel, match="cut by the rule") as refused:
        gguf_tokenizer(file)
    assert "tokenizer.json" in refused.value.hint
    beside = (BUILTIN_FOLDER / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(beside)
    assert gguf_tokenizer(file).encode("def main") == Tokenizer.open(BUILTIN_FOLDER).encode(
        "def main"
    )
