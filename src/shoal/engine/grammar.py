"""Holds a session's text to a grammar: which tokens may come next. By llguidance, an optional
library; this module can be imported without it, and without torch and numpy.

Schemas come from strangers. Their size is bounded (`MAX_GRAMMAR_BYTES`), what made the library
work without end is refused (`_screened`), what it builds is bounded (`_LIMITS`), and whoever waits
for a compilation waits so long and no longer. A grammar that outgrows its limits in the middle of a
text ends that text, as max_tokens would, and no other.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from ..errors import InvalidRequest, Overloaded
from .request import Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    from ..models.text import Tokenizer

MAX_PROPERTIES = 500  # of one object: the library's work grows with their square
MAX_MULTIPLE = 1_000  # product of all multipleOf, in units of their last digit: states to be built
MAX_TOOLS = 128
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
_OPTIONS = {  # endless white space is what small models like best
    "whitespace_pattern": r"[ \n\r\t]{0,16}",
    "coerce_one_of": True,  # oneOf is read as anyOf
}


class Tool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: Annotated[str, msgspec.Meta(pattern=r"\A[a-zA-Z0-9_.-]{1,64}\Z")]
    parameters: dict[str, Any] | bool = True  # a JSON schema


class ToolRules(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How calls are written: `begin`, `gap`, {"name": ..., `arguments`: {...}}, `gap`, `end`.

    Where `begin` is one special token of the model, `begin_token` is its id.
    """

    tools: Annotated[tuple[Tool, ...], msgspec.Meta(min_length=1, max_length=MAX_TOOLS)]
    begin: Annotated[str, msgspec.Meta(max_length=64)] = ""
    end: Annotated[str, msgspec.Meta(max_length=64)] = ""
    gap: Annotated[str, msgspec.Meta(max_length=8)] = ""
    begin_token: Annotated[int, msgspec.Meta(ge=-1, lt=1 << 32)] = -1
    arguments: Annotated[str, msgspec.Meta(max_length=64)] = "arguments"
    as_list: bool = False  # the calls are the items of one JSON list
    several: bool = True
    free_text: bool = False  # a text, or text before the calls, will do as well


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
        source = _source(grammar, self._has_tokens)
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


# ---- from our grammars to the library's language


def _source(grammar: Grammar, has_tokens: bool) -> str:
    """In llguidance's dialect of Lark. Raises InvalidRequest."""
    if grammar.kind == "json_object":
        return f"start: {_json_rule({'type': 'object'})}"
    if grammar.kind == "json_schema":
        return f"start: {_json_rule(_parsed(grammar.text))}"
    try:
        rules = msgspec.json.decode(grammar.text, type=ToolRules)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"these tools cannot be used: {error}") from None
    return _tool_grammar(rules if has_tokens else msgspec.structs.replace(rules, begin_token=-1))


def _tool_grammar(rules: ToolRules) -> str:
    names = [f"call_{index}" for index in range(len(rules.tools))]
    lines = [
        f'{name}: {_quoted(_head(tool, rules.arguments))} {_json_rule(tool.parameters)} "}}"'
        for name, tool in zip(names, rules.tools, strict=True)
    ]
    lines.append(f"call: {' | '.join(names)}")
    begin = f"<[{rules.begin_token}]>" if rules.begin_token >= 0 else _quoted(rules.begin)
    calls = "call"
    if rules.as_list:
        calls = '"[" call (", " call)* "]"' if rules.several else '"[" call "]"'
    lines.append(f"tail: {_quoted(rules.gap)} {calls} {_quoted(rules.gap + rules.end)}")
    again = f'("\\n" {begin} tail)*' if rules.several and not rules.as_list else ""
    if not rules.free_text:
        return "\n".join([f"start: {begin} tail {again}", *lines])
    return "\n".join([*_with_free_text(rules, begin, again), *lines])


def _with_free_text(rules: ToolRules, begin: str, again: str) -> list[str]:
    if rules.begin_token >= 0:
        return [f"start: TEXT ({begin} tail {again})?", r"TEXT: /(.|\n)*/"]
    if not rules.begin:  # a text that begins as an object does is a call
        return ["start: tail | TEXT", r"TEXT: /([^{\[](.|\n)*)?/"]
    more = "*" if rules.several else "?"
    return [
        f"start: (opened tail){more} TEXT",
        f"opened[lazy]: TEXT {begin}",
        r"TEXT: /(.|\n)*/",
    ]


def _head(tool: Tool, arguments: str) -> str:
    return f'{{"name": {json.dumps(tool.name)}, {json.dumps(arguments)}: '


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _json_rule(schema: dict[str, Any] | bool) -> str:
    plain: dict[str, Any] = _screened(schema) if isinstance(schema, dict) else {}
    return "%json " + json.dumps({**plain, "x-guidance": _OPTIONS})


def _parsed(text: str) -> dict[str, Any]:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the schema is not valid JSON: {error}") from None
    if not isinstance(schema, dict):
        raise InvalidRequest("the schema must be a JSON object")
    return schema


def _screened(schema: dict[str, Any]) -> dict[str, Any]:
    """Without what only names it; refuses what the library would work on for too long."""
    multiples: set[Decimal] = set()
    for part in _objects_in(schema):
        properties = part.get("properties")
        if isinstance(properties, dict) and len(properties) > MAX_PROPERTIES:
            raise InvalidRequest(
                f"the schema has an object of {len(properties)} properties, more than "
                f"{MAX_PROPERTIES}"
            )
        step = part.get("multipleOf")
        if isinstance(step, int | float) and not isinstance(step, bool):
            multiples.add(Decimal(str(step)))
    if _states(multiples) > MAX_MULTIPLE:
        raise InvalidRequest("the schema's multipleOf are too many or too long")
    return {name: value for name, value in schema.items() if name not in ("$schema", "$id")}


def _states(multiples: set[Decimal]) -> int:
    """How many remainders a number may leave by all of these, at most."""
    states = 1
    for step in multiples:
        if not step.is_finite() or abs(step.adjusted()) > 9:
            return MAX_MULTIPLE + 1
        _, digits, exponent = step.as_tuple()
        units = int("".join(map(str, digits)))
        states *= max(1, units) * 10 ** abs(int(exponent))
    return states


def _objects_in(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in a JSON value, however deep."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            yield one
            waiting.extend(one.values())
        elif isinstance(one, list):
            waiting.extend(one)
