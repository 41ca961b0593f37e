"""What a chat asks of the form of its answer: tools that may be called, or JSON of a schema. Pure,
but for the check of a grammar.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import anyio
import msgspec

from ..engine.grammar import Grammars, is_available
from ..engine.grammar_source import Tool, ToolRules
from ..engine.request import Grammar
from ..errors import InvalidRequest
from ..models.text import Tokenizer
from .bodies import ChatBody, ToolSpec
from .calls import CallReader
from .dialect import Dialect, dialect_of

CHECK_WITHIN_S = 2.0


@dataclass(frozen=True, slots=True)
class Tools:
    """The tools that a request may have called, and how its model writes that."""

    dialect: Dialect
    names: tuple[str, ...]
    markers: dict[int, str]

    def reader(self) -> CallReader:
        return CallReader(self.dialect, self.names)


def tools_of(body: ChatBody, tokenizer: Tokenizer) -> Tools | None:
    offered = body.offered_tools
    if not offered:
        return None
    dialect = dialect_of(tokenizer)
    names = tuple(each.function.name for each in offered)
    return Tools(dialect, names, dialect.markers(tokenizer))


async def grammar_of(body: ChatBody, tools: Tools | None) -> Grammar | None:
    """What the answer is held to. Raises InvalidRequest that says what is wrong with a schema."""
    if tools is not None and body.restricts_calls:
        return await _checked("tools", _rules(body, tools), "tools")
    if body.response_format is None or body.response_format.type == "text":
        return None
    if body.response_format.type == "json_object":
        return Grammar("json_object")
    return await _checked("json_schema", body.response_format.schema_text, "response_format")


def _rules(body: ChatBody, tools: Tools) -> str:
    dialect, marker = tools.dialect, next(iter(tools.markers), -1)
    is_token = tools.markers.get(marker) == dialect.begin
    rules = ToolRules(
        tuple(_tool(each, body.forces_call) for each in body.callable_tools),
        begin=dialect.begin,
        end=dialect.end,
        gap=dialect.gap,
        begin_token=marker if is_token else -1,
        arguments=dialect.arguments,
        as_list=dialect.as_list,
        several=dialect.several and body.parallel_tool_calls is not False and not body.named_tool,
        free_text=not body.forces_call,
    )
    return msgspec.json.encode(rules).decode()


def _tool(spec: ToolSpec, forced: bool) -> Tool:
    function = spec.function
    schema = function.parameters if forced or function.strict else None
    return Tool(function.name, schema or {"type": "object"})


async def _checked(kind: Any, text: str, param: str) -> Grammar:
    """Checked here, where the client can be told at once; the stage checks what strangers send."""
    try:
        grammar = Grammar(kind, text)
        if is_available():
            await anyio.to_thread.run_sync(_check, grammar)
    except ValueError as error:
        raise InvalidRequest(f"{param}: {error}", param=param) from None
    except InvalidRequest as error:
        raise InvalidRequest(error.message, hint=error.hint, param=param) from None
    return grammar


def _check(grammar: Grammar) -> None:
    _checker().matcher(grammar, CHECK_WITHIN_S)


@cache
def _checker() -> Grammars:
    return Grammars.of_bytes()


def with_parsed_arguments(calls: Sequence[dict[str, Any]], param: str) -> list[dict[str, Any]]:
    """Earlier calls as chat templates want them: with arguments that are objects, not their JSON.

    Raises InvalidRequest for what no model can have called.
    """
    return [_with_parsed_arguments(call, f"{param}[{at}]") for at, call in enumerate(calls)]


def _with_parsed_arguments(call: dict[str, Any], param: str) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidRequest(f"{param} calls no function", param=param)
    arguments = function.get("arguments") or {}
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise InvalidRequest(f"{param}: the arguments are no JSON object", param=param)
    return {**call, "function": {"name": function["name"], "arguments": parsed}}
