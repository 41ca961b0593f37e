"""Writes grammars in llguidance's own language. Pure text: the library is not needed for it.

Refuses, in words, what is known to keep the library busy for too long.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import Decimal
from typing import Annotated, Any

import msgspec

from ..errors import InvalidRequest
from .request import Grammar

MAX_PROPERTIES = 500  # of one object: the library's work grows with their square
MAX_MULTIPLE = 1_000  # product of all multipleOf, in units of their last digit: states to be built
MAX_TOOLS = 128
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


def source_of(grammar: Grammar, has_tokens: bool) -> str:
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
