"""The text of one choice as it grows, token by token. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..engine.request import Sampled
from ..models.text import StopStrings, Tokenizer
from .calls import Call, CallReader

Placed = tuple[int, Sampled]  # a token, and where in the choice's text its own text begins


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token added: text that is safe to show, and the tokens it is made of.

    `tokens` is filled only when logprobs were asked for. `finish` is "" while more is to come.
    `first_call` counts the calls of tools before `calls`.
    """

    text: str
    tokens: tuple[Placed, ...] = ()
    finish: str = ""
    calls: tuple[Call, ...] = ()
    first_call: int = 0


class ChoiceText:
    """Turns sampled tokens into pieces of text.

    Text is held back while it may be half a character or the beginning of a stop string; a token's
    logprobs are held back with its text, and dropped with it when a stop string cuts it off.
    `continues` is the prompt, in token ids, that the text goes on from. `calls` finds the calls of
    tools in it; `markers` are special tokens that it has to see.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str],
        continues: Sequence[int] = (),
        *,
        calls: CallReader | None = None,
        markers: Mapping[int, str] | None = None,
    ) -> None:
        self._calls, self._markers = calls, markers or {}
        self._stream = tokenizer.stream(continues)
        self._stops = StopStrings(stops) if stops else None
        self._held: list[Placed] = []
        self._decoded = 0  # characters, shown or not
        self._shown = 0
        self.tokens = 0  # sampled so far, the one that ended the text included

    def push(self, sampled: Sampled) -> Piece:
        self.tokens += 1
        is_text = sampled.finish != "stop"  # the token that ends a text is no part of it
        text = self._text_of(sampled.token) if is_text else ""
        if is_text and sampled.logprob is not None:
            self._held.append((self._decoded, sampled))
        if sampled.finish:
            text += self._stream.flush()
        self._decoded += len(text)
        shown, stopped = self._show(text, last=bool(sampled.finish))
        self._shown += len(shown)
        finish = "stop" if stopped else sampled.finish
        tokens = self._released(everything=bool(finish) and not stopped)
        if self._calls is None:
            return Piece(shown, tokens, finish)
        return self._without_calls(self._calls, Piece(shown, tokens, finish))

    @staticmethod
    def _without_calls(reader: CallReader, piece: Piece) -> Piece:
        before = reader.found
        text, calls = reader.read(piece.text, last=bool(piece.finish))
        called = piece.finish == "stop" and reader.found > 0
        return Piece(text, piece.tokens, "tool_calls" if called else piece.finish, calls, before)

    def _text_of(self, token: int) -> str:
        if token in self._markers:
            return self._stream.flush() + self._markers[token]
        return self._stream.push(token)

    def _show(self, text: str, last: bool) -> tuple[str, bool]:
        if self._stops is None:
            return text, False
        shown, stopped = self._stops.push(text)
        if last and not stopped:
            shown += self._stops.flush()
        return shown, stopped

    def _released(self, everything: bool) -> tuple[Placed, ...]:
        if not self._held:
            return ()
        ready = [
            placed for placed in self._held if everything or placed[0] < self._shown
        ]  # those whose text begins before the end of what is shown
        del self._held[: len(ready)]
        return tuple(ready)
