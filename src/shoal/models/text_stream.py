"""Text that grows token by token. Knows of a tokenizer only how to decode."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
LONGEST_WAIT = 32  # tokens: bytes that are no UTF-8 by then never will be
CONTEXT_TOKENS = 8  # of the prompt: as many as decide whether the output begins with a space


class TextStream:
    """Text that grows token by token; a character appears when its last byte is there.

    A window of the last shown tokens is decoded with each new one, because some tokenizers write a
    token differently at the beginning of a text.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt_ids: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = list(prompt_ids[-CONTEXT_TOKENS:])
        self._shown = len(self._window)  # tokens of the window whose text is out

    def push(self, token: int) -> str:
        """Take a token; returns the text that is now certain."""
        self._window.append(token)
        text = self._decode(self._window)
        waiting = len(self._window) - self._shown
        return "" if text.endswith(REPLACEMENT) and waiting < LONGEST_WAIT else self._show(text)

    def flush(self) -> str:
        """The rest, once no token will come: an unfinished character is a replacement character."""
        return self._show(self._decode(self._window))

    def _show(self, text: str) -> str:
        new = text[len(self._decode(self._window[: self._shown])) :]
        if new or len(self._window) > self._shown + LONGEST_WAIT:
            self._window = self._window[self._shown :]
            self._shown = len(self._window)
        return new
