"""The tokenizer that a GGUF file carries, rebuilt in the `tokenizers` library.

Two kinds are known: byte-level BPE ("gpt2") under the usual names for how words are cut, and
SentencePiece BPE ("llama"). Of others a `tokenizer.json` beside the file is taken. Nothing is
executed: the chat template runs in the sandbox of `chat_template.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from ..errors import UnsupportedModel
from .chat_template import ChatTemplate
from .gguf_file import GgufFile
from .text import Tokenizer

SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = SUFFIXES + WORDS + r"\p{N}{1,3}" + REST
QWEN2 = SUFFIXES + WORDS + r"\p{N}" + REST
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")  # they begin every text with bos_token
CUTS = {  # by `tokenizer.ggml.pre`: patterns applied one after the other
    **dict.fromkeys((*LLAMA3_NAMES, "smaug-bpe"), (LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), (QWEN2,)),
    **dict.fromkeys(("gpt-2", "phi-2"), (GPT2,)),
    "smollm": (r"\p{N}", GPT2),
}
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # of `tokenizer.ggml.token_type`
ROLES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")


def gguf_tokenizer(file: GgufFile, now: Callable[[], datetime] = datetime.now) -> Tokenizer:
    """Raises UnsupportedModel when the file has none, or one of a kind that is not known here."""
    try:
        return _Vocabulary(file).tokenizer(now)
    except UnsupportedModel:
        if (file.path.parent / "tokenizer.json").is_file():
            return Tokenizer.open(file.path.parent, now)
        raise


class _Vocabulary:
    def __init__(self, file: GgufFile) -> None:
        self._name, self._entries = file.path.name, file.entries
        self.tokens: list[str] = self._list("tokens", str)
        self.kinds: list[int] = self._list("token_type", int)
        if len(self.kinds) != len(self.tokens) or len({*self.tokens}) != len(self.tokens):
            raise self._unsupported("its list of tokens does not add up")
        self.ids = {token: id for id, token in enumerate(self.tokens)}

    def tokenizer(self, now: Callable[[], datetime]) -> Tokenizer:
        builders = {"gpt2": self._byte_level, "llama": self._sentencepiece}
        kind = str(self._get("model"))
        if kind not in builders:
            raise self._unsupported(f"its tokenizer is of the kind {kind[:40]!r}")
        try:
            inner = builders[kind]()
        except (ValueError, TypeError) as error:  # the library's own words on what does not fit
            raise self._unsupported(f"its tokenizer cannot be built: {error}") from None
        self._add_tokens(inner)
        special = {role: token for role, key in ROLES.items() if (token := self._token(key))}
        usual = kind == "llama" or self._get("pre") in LLAMA3_NAMES
        if self._get("add_bos_token", usual) and "bos_token" in special:
            inner.post_processor = _beginning_with(special["bos_token"], self.ids)
        template = self._entries.get("tokenizer.chat_template")
        templates = {"default": ChatTemplate(template, special, now)} if template else {}
        ends = [self.ids[token] for key in ENDS if (token := self._token(key))]
        return Tokenizer(
            inner, eos_ids=tuple(dict.fromkeys(ends)), special=special, templates=templates
        )

    # ---- the two kinds

    def _byte_level(self) -> tokenizers.Tokenizer:
        how = str(self._get("pre"))
        if how not in CUTS:
            raise self._unsupported(f"its words are cut by the rule {how[:40]!r}")
        merges = [_pair(merge) for merge in self._list("merges", str)]
        ignores = how in LLAMA3_NAMES
        inner = tokenizers.Tokenizer(
            models.BPE(vocab=self.ids, merges=merges, ignore_merges=ignores)
        )
        cuts = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in CUTS[how]]
        bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.pre_tokenizer = pre_tokenizers.Sequence([*cuts, bytes_of])
        inner.decoder = decoders.ByteLevel()
        return inner

    def _sentencepiece(self) -> tokenizers.Tokenizer:
        scores = self._list("scores", float)
        merges = [*_merges(self.ids, scores)]
        unknown = next(
            (t for t, k in zip(self.tokens, self.kinds, strict=True) if k == UNKNOWN), None
        )
        inner = tokenizers.Tokenizer(
            models.BPE(
                vocab=self.ids, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True
            )
        )
        prefix = self._get("add_space_prefix", True)
        spaces = normalizers.Replace(" ", "▁")
        inner.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), spaces] if prefix else [spaces]
        )
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        inner.decoder = decoders.Sequence(
            [*steps, *([decoders.Strip(" ", 1, 0)] if prefix else [])]
        )
        return inner

    def _add_tokens(self, inner: tokenizers.Tokenizer) -> None:
        kinds = list(zip(self.tokens, self.kinds, strict=True))
        inner.add_special_tokens([_added(token) for token, kind in kinds if kind == CONTROL])
        inner.add_tokens([_added(token) for token, kind in kinds if kind == USER_DEFINED])

    # ---- entries

    def _get(self, key: str, default: Any = None) -> Any:
        return self._entries.get(f"tokenizer.ggml.{key}", default)

    def _list(self, key: str, kind: type) -> list[Any]:
        values = self._get(key)
        if not isinstance(values, list) or not all(type(value) is kind for value in values):
            raise self._unsupported(f"it has no tokenizer.ggml.{key}")
        return values

    def _token(self, key: str) -> str | None:
        id = self._get(key)
        return self.tokens[id] if type(id) is int and 0 <= id < len(self.tokens) else None

    def _unsupported(self, why: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"{self._name}: {why}",
            hint="put the model's tokenizer.json (and tokenizer_config.json) beside the file",
        )


def _added(token: str) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(token, normalized=False)


def _pair(merge: str) -> tuple[str, str]:
    """A space parts the two halves; it may be one of their letters only in the first place."""
    left, _, right = merge[1:].partition(" ")
    return merge[:1] + left, right


def _merges(ids: Mapping[str, int], scores: Sequence[float]) -> Iterator[tuple[str, str]]:
    """SentencePiece joins the two neighbours whose whole has the best score."""
    found = []
    for whole, id in ids.items():
        halves = [(whole[:cut], whole[cut:]) for cut in range(1, len(whole))]
        known = [(ids[a], ids[b], a, b) for a, b in halves if a in ids and b in ids]
        found += [(-scores[id], *each) for each in sorted(known)]
    found.sort(key=lambda each: each[0])
    return ((left, right) for *_, left, right in found)


def _beginning_with(bos: str, ids: Mapping[str, int]) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, ids[bos])]
    )
