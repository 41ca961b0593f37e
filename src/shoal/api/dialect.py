"""How families of models write calls of tools, recognised by what their chat template says.

A model whose template does not know of tools is told of them in a system message, and of the form
that calls take: that of Hermes and Qwen, which most others have read too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..models.text import Tokenizer

Message = dict[str, Any]

PYTHON_TAG = "<|python_tag|>"
_OTHER_FORMS = ("[ARGS]", "<function=", "<arg_key>")  # of calls that are no JSON


@dataclass(frozen=True, slots=True)
class Dialect:
    """A call is `begin`, JSON with a name and `arguments`, `end`.

    Without `begin` an answer that begins like an object is a call, all of it.
    """

    begin: str
    end: str = ""
    gap: str = ""  # between these and the JSON
    arguments: str = "arguments"
    as_list: bool = False  # the calls are the items of one JSON list
    several: bool = True
    in_template: bool = True  # the template shows the tools, the calls and their results

    def markers(self, tokenizer: Tokenizer) -> dict[int, str]:
        """Special tokens, else left out of a text, that the calls in it are recognised by."""
        named = {text: tokenizer.special_id(text) for text in (self.begin, self.end, PYTHON_TAG)}
        return {token: text for text, token in named.items() if token is not None}


HERMES = Dialect("<tool_call>", "</tool_call>", gap="\n")
LLAMA = Dialect("", arguments="parameters", several=False)
MISTRAL = Dialect("[TOOL_CALLS]", as_list=True)
GENERIC = Dialect("<tool_call>", "</tool_call>", gap="\n", in_template=False)


def dialect_of(tokenizer: Tokenizer) -> Dialect:
    source = tokenizer.template_source(for_tools=True)
    if "tools" not in source or any(mark in source for mark in _OTHER_FORMS):
        return GENERIC
    if HERMES.begin in source:
        return HERMES
    if MISTRAL.begin in source:
        return MISTRAL
    return LLAMA if PYTHON_TAG in source or '"parameters"' in source else GENERIC


def told_in_words(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The conversation for a template without tools: they, their calls and results become text."""
    told = [_in_words(message) for message in messages]
    if not tools:
        return told
    words = _introduction(tools)
    if told[0]["role"] == "system":
        return [{**told[0], "content": f"{told[0]['content']}\n\n{words}"}, *told[1:]]
    return [{"role": "system", "content": words}, *told]


def _in_words(message: Message) -> Message:
    if message["role"] == "tool":
        result = f"<tool_response>\n{message['content']}\n</tool_response>"
        return {"role": "user", "content": result}
    calls = message.get("tool_calls")
    if not calls:
        return message
    written = [
        f"{GENERIC.begin}\n{json.dumps(call['function'], ensure_ascii=False)}\n{GENERIC.end}"
        for call in calls
    ]
    said = [message["content"]] if message["content"] else []
    return {"role": message["role"], "content": "\n".join([*said, *written])}


def _introduction(tools: Sequence[Mapping[str, Any]]) -> str:
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        f"You can call these functions:\n<tools>\n{listed}\n</tools>\n"
        "To call one, answer with its name and arguments as JSON, in exactly this form:\n"
        '<tool_call>\n{"name": "NAME", "arguments": {"ARGUMENT": "VALUE"}}\n</tool_call>\n'
        "Its result comes back between <tool_response> and </tool_response>."
    )
