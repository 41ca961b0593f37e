"""Turns chat messages into a prompt, with the checkpoint's own Jinja template.

The template came with the weights from anywhere: it runs in Jinja's sandbox, without loaders, and
what it writes is bounded. The environment is the one that transformers gives to templates.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import InvalidRequest

MAX_PROMPT_CHARACTERS = 8_000_000

# What an expression of a template can run into, beside Jinja's own errors.
TEMPLATE_FAULTS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


class ChatTemplate:
    """One template with the special tokens it may name, for example bos_token. `now` is a clock."""

    def __init__(
        self,
        source: str,
        variables: Mapping[str, str],
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        self.source, self._variables, self._now = source, variables, now

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> str:
        """The prompt. `options` become variables, for example enable_thinking=False.

        Raises InvalidRequest when the template refuses the messages, fails on them or writes more
        than MAX_PROMPT_CHARACTERS.
        """
        variables = {**self._variables, "add_generation_prompt": True, **options}
        variables |= {"messages": messages, "tools": tools}
        try:
            return _bounded(self._compiled.generate(**variables))
        except TEMPLATE_FAULTS as error:
            raise InvalidRequest(
                f"the model's chat template cannot use these messages: {error}",
                hint="check roles, their order and the content, or use /v1/completions",
                param="messages",
            ) from error

    @cached_property
    def _compiled(self) -> Template:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", Generation],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: self._now().strftime(form)
        return environment.from_string(self.source)


class Generation(Extension):
    """`{% generation %}`, with which templates mark what the assistant said: it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own form)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _bounded(pieces: Iterable[str]) -> str:
    written, size = [], 0
    for piece in pieces:
        size += len(piece)
        if size > MAX_PROMPT_CHARACTERS:
            raise ValueError(f"it writes more than {MAX_PROMPT_CHARACTERS} characters")
        written.append(piece)
    return "".join(written)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own filter, this one does not escape for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)
