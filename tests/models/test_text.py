import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Inner

from shoal.errors import InvalidRequest, ModelNotFound, UnsupportedModel
from shoal.models.text import Tokenizer

TEXT = "Many small machines make one big model. Viele Männer, größere Fische: 😀 🐟 日本語の文章 "


def byte_level() -> Inner:
    """The kind of Llama 3, Qwen and GPT: every byte is a letter."""
    inner = Inner(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(
        [TEXT] * 3,
        trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=["<s>", "</s>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    inner.add_tokens([AddedToken("<think>", special=False)])
    return inner


def byte_fallback() -> Inner:
    """The kind of Llama 2 and Mistral: words begin with ▁, unknown characters are bytes."""
    words = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["▁", "▁Fish", "es", "▁swim", ".", "a", "b", "F", "i", "s", "h", "e", "w", "m"]
    merges = [("F", "i"), ("s", "h"), ("Fi", "sh"), ("▁", "Fish"), ("e", "s"), ("s", "w")]
    merges += [("i", "m"), ("sw", "im"), ("▁", "swim")]
    words += ["Fi", "sh", "Fish", "sw", "im", "swim"]
    vocabulary = {word: index for index, word in enumerate(words)}
    inner = Inner(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    inner.add_special_tokens(["<unk>", "<s>"])
    return inner


BYTE_LEVEL, BYTE_FALLBACK = Tokenizer(byte_level()), Tokenizer(byte_fallback())
texts = st.text(st.characters(codec="utf-8", exclude_characters="▁"), max_size=30)
both = pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["level", "fallback"])


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Write a checkpoint's text files; a dict is written as JSON."""
    byte_level().save(str(tmp_path / "tokenizer.json"))

    def write(**files: Any) -> Path:
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            suffix = "jinja" if name == "chat_template" else "json"
            (tmp_path / f"{name}.{suffix}").write_text(text)
        return tmp_path

    return write


def pieces_of(tokenizer: Tokenizer, ids: list[int], prompt: tuple[int, ...] = ()) -> list[str]:
    stream = tokenizer.stream(prompt)
    return [*map(stream.push, ids), stream.flush()]


@both
@given(texts)
def test_text_survives_the_way_to_ids_and_back(tokenizer: Tokenizer, text: str) -> None:
    text = text.strip(" ")
    assert tokenizer.decode(tokenizer.encode(text)) == text


@both
@given(texts)
def test_streamed_text_is_the_whole_text_and_never_takes_a_character_back(
    tokenizer: Tokenizer, text: str
) -> None:
    ids = tokenizer.encode(text)
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces)


@given(st.lists(st.integers(0, 340), max_size=30))
def test_any_ids_stream_to_the_text_that_they_decode_to(ids: list[int]) -> None:
    assert "".join(pieces_of(BYTE_LEVEL, ids)) == BYTE_LEVEL.decode(ids)


def test_a_character_of_several_tokens_appears_with_its_last_one() -> None:
    ids = [BYTE_FALLBACK.encode("a🐬b")[-6:][n] for n in range(6)]
    assert pieces_of(BYTE_FALLBACK, ids) == ["a", "", "", "", "🐬", "b", ""]


def test_an_unfinished_character_comes_out_at_the_end() -> None:
    cut = BYTE_FALLBACK.encode("a🐬")[:-1]
    assert "".join(pieces_of(BYTE_FALLBACK, cut)).startswith("a\ufffd")


def test_bytes_that_are_no_text_are_not_held_back_for_ever() -> None:
    lone = BYTE_FALLBACK.encode("🐬")[-1]
    stream = BYTE_FALLBACK.stream()
    assert "\ufffd" in "".join(stream.push(lone) for _ in range(100))
    stream = BYTE_FALLBACK.stream()
    assert "".join(stream.push(1) for _ in range(200)) == ""
    assert len(stream._window) < 100


def test_output_that_continues_a_prompt_keeps_its_first_space() -> None:
    prompt, swim = BYTE_FALLBACK.encode("Fishes"), BYTE_FALLBACK.encode("swim")
    assert "".join(pieces_of(BYTE_FALLBACK, swim)) == "swim"
    assert "".join(pieces_of(BYTE_FALLBACK, swim, tuple(prompt))) == " swim"


@both
@pytest.mark.parametrize("token", [-1, 5000, 2**40])
def test_ids_that_do_not_exist_give_no_text(tokenizer: Tokenizer, token: int) -> None:
    assert tokenizer.decode([token]) == ""
    assert tokenizer.token_bytes(token) == b""
    assert tokenizer.stream().push(token) == ""


@both
@given(texts)
def test_the_bytes_of_the_tokens_join_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special=False)
    joined = b"".join(map(tokenizer.token_bytes, ids)).decode()
    assert joined.removeprefix(" ") == text.removeprefix(" ")


def test_a_token_is_shown_as_text_even_when_it_is_part_of_a_character() -> None:
    last = BYTE_FALLBACK.encode("🐬")[-1]
    assert BYTE_FALLBACK.token_bytes(last) == "🐬".encode()[-1:]
    assert BYTE_FALLBACK.token_text(last) == "\ufffd"
    assert BYTE_FALLBACK.token_text(BYTE_FALLBACK.encode("a Fish")[-1]) == " Fish"
    assert BYTE_LEVEL.token_text(1) == "</s>"


def test_special_tokens_are_added_on_request_and_skipped_in_text() -> None:
    assert BYTE_LEVEL.encode("model")[0] == 0
    assert BYTE_LEVEL.encode("model", add_special=False)[0] != 0
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode("<think>a</s>b")) == "<think>ab"


def test_half_of_a_surrogate_pair_is_an_invalid_request() -> None:
    with pytest.raises(InvalidRequest, match="surrogate"):
        BYTE_LEVEL.encode("a\ud83d")


def test_a_folder_opens_with_its_special_tokens_and_all_ends_of_text(
    folder: Callable[..., Path],
) -> None:
    path = folder(
        tokenizer_config={"eos_token": {"content": "<|im_end|>"}, "add_bos_token": True},
        special_tokens_map={"bos_token": "<s>", "eos_token": "</s>"},
        generation_config={"eos_token_id": [1, 7]},
        config={"eos_token_id": 9},
    )
    tokenizer = Tokenizer.open(path)
    assert tokenizer.special == {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    assert tokenizer.eos_ids == (1, 7, 2)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_a_folder_with_nothing_but_the_tokenizer_opens(folder: Callable[..., Path]) -> None:
    tokenizer = Tokenizer.open(folder())
    assert tokenizer.eos_ids == ()
    assert Tokenizer.open(folder(config={"eos_token_id": 9})).eos_ids == (9,)


def test_tokens_that_only_the_configuration_names_are_added(folder: Callable[..., Path]) -> None:
    size = BYTE_LEVEL.vocab_size
    added = {str(size): {"content": "<|call|>", "special": True}, "1": {"content": "</s>"}}
    tokenizer = Tokenizer.open(folder(tokenizer_config={"added_tokens_decoder": added}))
    assert tokenizer.encode("<|call|>", add_special=False) == [size]
    assert tokenizer.vocab_size == size + 1


def test_prompts_are_never_cut_or_filled_up(folder: Callable[..., Path]) -> None:
    path, inner = folder(), byte_level()
    inner.enable_truncation(4)
    inner.enable_padding(length=50)
    inner.save(str(path / "tokenizer.json"))
    assert Tokenizer.open(path).encode(TEXT) == BYTE_LEVEL.encode(TEXT)


@pytest.mark.parametrize(
    ("files", "tools", "expected"),
    [
        ({"tokenizer_config": {"chat_template": "one"}}, None, "one"),
        ({"tokenizer_config": {"chat_template": "one"}, "chat_template": "file"}, None, "file"),
        (
            {
                "tokenizer_config": {
                    "chat_template": [
                        {"name": "default", "template": "plain{{ bos_token }}"},
                        {"name": "tool_use", "template": "tools"},
                    ],
                    "bos_token": "<s>",
                }
            },
            None,
            "plain<s>",
        ),
        (
            {
                "tokenizer_config": {
                    "chat_template": [
                        {"name": "default", "template": "plain"},
                        {"name": "tool_use", "template": "tools"},
                    ]
                }
            },
            [{"name": "sum"}],
            "tools",
        ),
    ],
)
def test_the_chat_template_is_found_wherever_it_is_kept(
    folder: Callable[..., Path],
    files: dict[str, Any],
    tools: list[dict[str, str]] | None,
    expected: str,
) -> None:
    assert Tokenizer.open(folder(**files)).render_chat([], tools) == expected


def test_a_model_without_a_chat_template_points_to_completions() -> None:
    with pytest.raises(InvalidRequest, match="no chat template") as caught:
        BYTE_LEVEL.render_chat([{"role": "user", "content": "Hi"}])
    assert "/v1/completions" in caught.value.hint


def test_a_missing_or_damaged_tokenizer_is_refused_with_a_hint(
    folder: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ModelNotFound, match="no folder"):
        Tokenizer.open(tmp_path / "nowhere")
    folder(tokenizer_config="{")
    with pytest.raises(UnsupportedModel, match=r"tokenizer_config\.json cannot be read"):
        Tokenizer.open(tmp_path)
    folder(tokenizer_config={}, tokenizer='{"model": {"type": "Unheard"}}')
    with pytest.raises(UnsupportedModel, match=r"tokenizer\.json cannot be read"):
        Tokenizer.open(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UnsupportedModel, match=r"has no tokenizer\.json") as caught:
        Tokenizer.open(tmp_path)
    assert "save_pretrained" in caught.value.hint


def test_neither_torch_nor_transformers_is_loaded_for_text() -> None:
    program = "import sys, shoal.models.text; print({'torch', 'transformers'} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert answer.stdout.strip() == "set()"
