"""Holds a session's text to a grammar: which tokens may come next. By llguidance, an optional
library; this module can be imported without it, and without torch and numpy.

Schemas come from strangers. Their size is bounded (`MAX_GRAMMAR_BYTES`), what made the library
work without end is refused (`grammar_source.py`), what it builds is bounded (`_LIMITS`), and
whoever waits for a compilation waits so long and no longer. A grammar that outgrows its limits in
the middle of a text ends that text, as max_tokens would, and no other.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from ..errors import InvalidRequest, Overloaded
from .grammar_source import source_of
from .request import Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    from ..models.text import Tokenizer

COMPILED_GRAMMARS = 64  # that are kept for the next session
COMPILERS = 2  # at a time
_LIMITS = {  # 50 000 units of a lexer's fuel are about 1 ms at first, 14 000 in a step
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 30_000,
    "step_max_items": 20_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 50_000,
    "verbose_errors": False,
}


class Matcher:
    """Follows one text through its grammar, token by token."""

    def __init__(self, inner: LLMatcher, eos_ids: tuple[int, ...]) -> None:
        self._inner, self._eos_ids = inner, eos_ids
        self.end_id = eos_ids[0]
        self.ended = False  # by an end token, which the grammar allowed
        self.failed = False  # it outgrew its limits, or a token came that it does not allow

    def allowed(self) -> bytes:
        """Token i may come next if bit i % 8 of byte i // 8 is set; at the end an end token only.

        Empty when it `failed`.
        """
        try:
            mask: bytes = self._inner.compute_bitmask()
        except ValueError:  # its limits
            self.failed = True
        self.failed = self.failed or self._inner.is_error()
        return b"" if self.failed else mask

    def take(self, token: int) -> None:
        self.failed = self.failed or self.ended or not self._inner.consume_token(token)
        self.ended = not self.failed and token in self._eos_ids


class Grammars:
    """The compiled grammars of one tokenizer. May be called by several threads."""

    def __init__(
        self, tokenizer: LLTokenizer, eos_ids: tuple[int, ...], *, has_tokens: bool = True
    ) -> None:
        self._tokenizer, self._eos_ids, self._has_tokens = tokenizer, eos_ids, has_tokens
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()
        self._compilers = threading.BoundedSemaphore(COMPILERS)

    @classmethod
    def of(cls, tokenizer: Tokenizer, vocab_size: int) -> Grammars:
        """For texts of a model with `vocab_size` logits. 0.1 to 1 s of work.

        Raises InvalidRequest where grammars cannot be had: every request for one is told so.
        """
        if not tokenizer.eos_ids:
            raise InvalidRequest("this model has no end token, without which no grammar ends")
        library = _library()
        size = max(vocab_size, tokenizer.vocab_size)
        try:
            inner = library.LLTokenizer(
                tokenizer.to_json(),
                n_vocab=size,
                eos_token=list(tokenizer.eos_ids),
                slices=library.LLTokenizer.json_slices(),
            )
        except ValueError as error:
            raise InvalidRequest(f"grammars cannot read this model's tokenizer: {error}") from None
        return cls(inner, tokenizer.eos_ids)

    @classmethod
    def of_bytes(cls) -> Grammars:
        """For checking grammars where no model is: every byte is a token. Raises InvalidRequest
        without the library.
        """
        from llguidance._tokenizer import TokenizerWrapper

        wrapper = TokenizerWrapper(_Bytes())
        return cls(
            _library().LLTokenizer(wrapper, slices=[]), (_Bytes.eos_token_id,), has_tokens=False
        )

    def matcher(self, grammar: Grammar, patience_s: float) -> Matcher:
        """At the beginning of a text. Raises InvalidRequest that says what is wrong with `grammar`,
        or Overloaded when it is not compiled in time: it may be at the next try.
        """
        known = self._known(grammar) or self._compile_within(patience_s, grammar)
        with self._lock:
            return Matcher(known.deep_copy(), self._eos_ids)

    def _known(self, grammar: Grammar) -> LLMatcher | None:
        with self._lock:
            if grammar not in self._compiled:
                return None
            self._compiled.move_to_end(grammar)
            return self._compiled[grammar]

    def _keep(self, grammar: Grammar, compiled: LLMatcher) -> None:
        with self._lock:
            self._compiled[grammar] = compiled
            while len(self._compiled) > COMPILED_GRAMMARS:
                self._compiled.popitem(last=False)

    def _compile_within(self, patience_s: float, grammar: Grammar) -> LLMatcher:
        """In a thread that may be left behind: the library cannot be interrupted."""
        source = source_of(grammar, self._has_tokens)
        if not self._compilers.acquire(timeout=patience_s):
            raise Overloaded("too many schemas are being compiled", hint="ask again in a moment")
        made: list[LLMatcher] = []
        arguments = (grammar, source, made)
        thread = threading.Thread(target=self._compile, args=arguments, daemon=True)
        thread.start()
        thread.join(patience_s)
        if not made:
            raise Overloaded(
                f"the schema takes longer than {patience_s:g} s to compile",
                hint="ask again in a moment, or make it smaller or plainer",
            )
        if made[0].is_error():
            raise InvalidRequest(f"the schema cannot be used: {_short(made[0].get_error())}")
        if made[0].is_stopped():
            raise InvalidRequest("the schema cannot be used: no text can be all that it asks for")
        return made[0]

    def _compile(self, grammar: Grammar, source: str, made: list[LLMatcher]) -> None:
        try:
            library = _library()
            limits: LLParserLimits = library.LLParserLimits(**_LIMITS)
            matcher = library.LLMatcher(self._tokenizer, source, log_level=0, limits=limits)
            if matcher.is_error():
                made.append(matcher)
                return
            first = matcher.deep_copy()
            if Matcher(first, self._eos_ids).allowed():
                self._keep(grammar, matcher)
                made.append(matcher)
            else:
                made.append(first)
        finally:
            self._compilers.release()


class _Bytes:
    """The tokenizer of `Grammars.of_bytes`, as llguidance wants it."""

    eos_token_id = 256
    bos_token_id = None
    tokens = (*(bytes([value]) for value in range(256)), b"<end>")
    special_token_ids = (256,)

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def is_available() -> bool:
    try:
        _library()
    except InvalidRequest:
        return False
    return True


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise InvalidRequest(
            f"answers cannot be held to a grammar here: {error}",
            hint='install the engine with: pip install "shoal[engine]"',
        ) from error
    return llguidance


def _short(error: str) -> str:
    line = " ".join(error.partition("<non-verbose/>")[0].split())
    return line if len(line) <= 300 else f"{line[:300]} ..."
