"""Token ids for text that another engine wrote: not necessarily those it chose, but ids whose text
is the very same.

Each piece of text is encoded as the tokenizer would, if that gives back exactly its bytes; else it
is cut greedily into the longest tokens of the vocabulary. Tokenizers that know every byte can
write any text this way.
"""

from __future__ import annotations

from functools import cached_property

from ...errors import UnsupportedModel
from ...models.text import Tokenizer


class Retokeniser:
    """`ids(text)`: ids whose bytes, one after the other, are the text's."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def ids(self, text: str) -> list[int]:
        """Raises UnsupportedModel when the vocabulary cannot spell the text."""
        ids = self._tokenizer.encode(text, add_special=False)
        wanted = text.encode()
        if b"".join(map(self._tokenizer.token_bytes, ids)) == wanted and not self._special & {*ids}:
            return ids
        return self._spelled(wanted)

    def prepare(self) -> None:
        """What takes long. Call it in a thread."""
        _ = self._longest

    def _spelled(self, text: bytes) -> list[int]:
        known, longest = self._tokenizer.id_of_bytes, self._longest
        ids: list[int] = []
        at = 0
        while at < len(text):
            end = min(len(text), at + longest)
            while end > at and text[at:end] not in known:
                end -= 1
            if end == at:
                raise UnsupportedModel(
                    f"the vocabulary has no token for the byte {text[at]:#04x}",
                    hint="use an engine that gives token ids: llama.cpp's server or vLLM",
                )
            ids.append(known[text[at:end]])
            at = end
        return ids

    @cached_property
    def _special(self) -> frozenset[int]:
        """Their text is left out when ids become text."""
        return self._tokenizer.special_ids

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._tokenizer.id_of_bytes), default=1)
