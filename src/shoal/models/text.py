"""Between text and token ids: tokenizer, chat prompts, and text that grows token by token.

Knows the files of a Hugging Face checkpoint that speak of text. Needs neither torch nor
transformers, so a gateway without an engine can use it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import tokenizers

from ..errors import InvalidRequest, ModelNotFound, UnsupportedModel
from .chat_template import ChatTemplate
from .stop_strings import StopStrings
from .text_stream import TextStream

__all__ = ["StopStrings", "TextStream", "Tokenizer"]

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """One checkpoint's tokenizer. `eos_ids` end a text; `special` names tokens, e.g. bos_token."""

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        *,
        eos_ids: tuple[int, ...] = (),
        special: Mapping[str, str] | None = None,
        templates: Mapping[str, ChatTemplate] | None = None,
    ) -> None:
        self._inner = inner
        self._templates = templates or {}
        self.eos_ids, self.special = eos_ids, special or {}

    @classmethod
    def open(cls, folder: Path, now: Callable[[], datetime] = datetime.now) -> Tokenizer:
        """Read a checkpoint's folder; `now` is the clock of templates that write the date.

        Raises ModelNotFound when there is no such folder, UnsupportedModel when the tokenizer is
        missing or damaged.
        """
        config = _read_json(folder / "tokenizer_config.json")
        inner = _read_tokenizer(folder)
        _add_missing_tokens(inner, config.get("added_tokens_decoder"))
        special = _special(_read_json(folder / "special_tokens_map.json")) | _special(config)
        templates = {
            name: ChatTemplate(source, special, now)
            for name, source in _template_sources(folder, config).items()
        }
        eos_ids = _eos_ids(folder, inner.token_to_id(special.get("eos_token", "")))
        return cls(inner, eos_ids=eos_ids, special=special, templates=templates)

    @property
    def vocab_size(self) -> int:
        return self._inner.get_vocab_size()

    @property
    def vocabulary(self) -> dict[str, int]:
        """The id of every token, special ones included."""
        return self._inner.get_vocab()

    def to_json(self) -> str:
        """The whole tokenizer, in the form of tokenizer.json."""
        text: str = self._inner.to_str()
        return text

    def special_id(self, text: str) -> int | None:
        """The id of the special token that is written `text`, if there is one."""
        known = self._inner.token_to_id(text)
        return known if known in self._added and self.decode([known]) == "" else None

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids. Rendered chats bring their special tokens along: `add_special=False`."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidRequest(
                "the text holds half of a surrogate pair, which no tokenizer can read",
                hint="send characters beyond U+FFFF whole",
            ) from None
        return self._inner.encode(text, add_special_tokens=add_special).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text without special tokens. Ids that do not exist give nothing."""
        known = [token for token in ids if 0 <= token < 1 << 32]
        return self._inner.decode(known, skip_special_tokens=True)

    def written(self, ids: Sequence[int]) -> str:
        """Text with special tokens written out, for an engine that reads prompts as text."""
        return self._inner.decode(list(ids), skip_special_tokens=False)

    def stream(self, prompt_ids: Sequence[int] = ()) -> TextStream:
        """The output's text as it grows. With `prompt_ids` it continues the prompt's text: some
        tokenizers write the first word's space only then."""
        return TextStream(self.decode, prompt_ids)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> str:
        """The prompt for a chat, special tokens included. Raises InvalidRequest."""
        template = self._template(for_tools=bool(tools))
        if template is None:
            raise InvalidRequest(
                "this model has no chat template: it continues text, it does not chat",
                hint="use /v1/completions with a prompt",
                param="messages",
            )
        return template.render(messages, tools, **options)

    def template_source(self, for_tools: bool = False) -> str:
        """The chat template in Jinja, "" when the model has none."""
        template = self._template(for_tools)
        return "" if template is None else template.source

    def _template(self, for_tools: bool) -> ChatTemplate | None:
        wanted = "tool_use" if for_tools and "tool_use" in self._templates else "default"
        return self._templates.get(wanted)

    def token_bytes(self, token: int) -> bytes:
        """What one token stands for, perhaps part of a character. Special tokens: their name."""
        piece = self._inner.id_to_token(token) if 0 <= token < 1 << 32 else None
        if piece is None:
            return b""
        if token in self._added:
            return piece.encode()
        if "ByteLevel" in self._decoder:
            known = _byte_of_letter()
            whole = all(letter in known for letter in piece)
            return bytes(map(known.__getitem__, piece)) if whole else piece.encode()
        if "ByteFallback" in self._decoder and (byte := BYTE_TOKEN.fullmatch(piece)):
            return bytes.fromhex(byte[1])
        return (piece.replace("▁", " ") if "▁" in self._decoder else piece).encode()

    def token_text(self, token: int) -> str:
        return self.token_bytes(token).decode("utf-8", "replace")

    @property
    def bos_id(self) -> int | None:
        """What begins a text, where the model has such a token."""
        return self._inner.token_to_id(self.special.get("bos_token", ""))

    @cached_property
    def id_of_bytes(self) -> dict[bytes, int]:
        """Every ordinary token by the bytes it stands for, of equal ones the lowest id. Takes some
        tenths of a second for a large vocabulary.
        """
        ids = range(self.vocab_size - 1, -1, -1)
        found = {self.token_bytes(id): id for id in ids if id not in self.special_ids}
        found.pop(b"", None)
        return found

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids that `decode` leaves out."""
        added = self._inner.get_added_tokens_decoder()
        return frozenset(id for id, token in added.items() if token.special)

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._inner.get_added_tokens_decoder())

    @cached_property
    def _decoder(self) -> str:
        """Names and settings of the steps from tokens to text."""
        return repr(self._inner.decoder)


def _read_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    if not folder.is_dir():
        raise ModelNotFound(f"there is no folder {folder}", hint="check the path of the model")
    try:
        inner = tokenizers.Tokenizer.from_buffer((folder / "tokenizer.json").read_bytes())
    except FileNotFoundError:
        raise UnsupportedModel(
            f"{folder} has no tokenizer.json",
            hint="load it once with transformers.AutoTokenizer and call save_pretrained(folder)",
        ) from None
    except (OSError, ValueError) as error:
        raise _damaged(folder / "tokenizer.json", error) from error
    inner.no_truncation()  # some files cut every text at 512 tokens
    inner.no_padding()
    return inner


def _read_json(path: Path) -> dict[str, Any]:
    """An object, or an empty one when the file is missing."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    return content if isinstance(content, dict) else {}


def _damaged(path: Path, error: Exception) -> UnsupportedModel:
    return UnsupportedModel(f"{path} cannot be read: {error}", hint="download the model again")


def _special(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and so on, each written as a string or as an object with `content`."""
    named = {name: value for name, value in config.items() if name.endswith("_token")}
    plain = {n: v.get("content") if isinstance(v, dict) else v for n, v in named.items()}
    return {name: value for name, value in plain.items() if isinstance(value, str)}


def _add_missing_tokens(inner: tokenizers.Tokenizer, added: object) -> None:
    """Older checkpoints name some special tokens in tokenizer_config.json alone."""
    if not isinstance(added, dict):
        return
    for index, entry in sorted((int(i), e) for i, e in added.items() if i.isdecimal()):
        content = entry.get("content") if isinstance(entry, dict) else None
        if index == inner.get_vocab_size() and isinstance(content, str):
            inner.add_special_tokens([content])


def _eos_ids(folder: Path, named: int | None) -> tuple[int, ...]:
    """All ids that end a text: the generation settings' (else the model's) and the tokenizer's."""
    settings = _read_json(folder / "generation_config.json").get("eos_token_id")
    if settings is None:
        settings = _read_json(folder / "config.json").get("eos_token_id")
    listed = settings if isinstance(settings, list) else [settings]
    return tuple(dict.fromkeys(i for i in [*listed, named] if isinstance(i, int)))


def _template_sources(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name; a single one is "default". The file chat_template.jinja goes first."""
    try:
        return {"default": (folder / "chat_template.jinja").read_text(encoding="utf-8")}
    except FileNotFoundError:
        source = config.get("chat_template")
    except (OSError, ValueError) as error:
        raise _damaged(folder / "chat_template.jinja", error) from error
    listed = source if isinstance(source, list) else [{"name": "default", "template": source}]
    entries = [entry for entry in listed if isinstance(entry, dict)]
    return {
        str(entry.get("name")): entry["template"]
        for entry in entries
        if isinstance(entry.get("template"), str)
    }


@cache
def _byte_of_letter() -> dict[str, int]:
    """The alphabet of byte-level BPE: printable Latin-1 stands for itself, the rest from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}
