"""Finds calls of tools in text that arrives in pieces. Knows nothing of tokens; no I/O."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from ..models.stop_strings import overlap
from .dialect import PYTHON_TAG, Dialect

_BETWEEN = " \t\r\n;,"  # what models write between two calls
_decoder = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class Call:
    id: str
    name: str
    arguments: str  # JSON


def short_id() -> str:
    """Nine letters and digits: templates of Mistral take no other."""
    return secrets.token_hex(5)[:9]


class CallReader:
    """Separates the calls in a text from what is said beside them.

    A call comes out whole. What looks like one but is not JSON, or calls what is not in `names`,
    is text.
    """

    def __init__(
        self, dialect: Dialect, names: Collection[str], new_id: Callable[[], str] = short_id
    ) -> None:
        self._dialect, self._names, self._new_id = dialect, frozenset(names), new_id
        self._held = ""  # not yet known to be text or call
        self._marker = ""  # that opened the call which `_held` is the beginning of
        self._inside = False
        self._fresh = True  # nothing but white space so far
        self._after_call = False  # and white space
        self.found = 0

    def read(self, text: str, last: bool = False) -> tuple[str, tuple[Call, ...]]:
        """Take a piece; returns the text that is surely text, and the calls that are whole now."""
        self._held += text
        shown: list[str] = []
        calls: list[Call] = []
        going_on = True
        while going_on:
            if self._inside:
                going_on = self._read_call(shown, calls, last)
            else:
                going_on = self._read_text(shown, last)
        self.found += len(calls)
        return "".join(shown), tuple(calls)

    def _read_text(self, shown: list[str], last: bool) -> bool:
        """Up to where a call begins; False when it takes more text to know where that is."""
        if not self._dialect.begin:
            return self._read_beginning(shown, last)
        before, marker, after = self._held.partition(self._dialect.begin)
        if marker:
            self._show(before, shown)
            self._held, self._marker, self._inside = after, marker, True
            return True
        keep = 0 if last else overlap(self._held, self._dialect.begin)
        self._show(self._held[: len(self._held) - keep], shown)
        self._held = self._held[len(self._held) - keep :]
        return False

    def _read_beginning(self, shown: list[str], last: bool) -> bool:
        """In a dialect without marks only the beginning of the answer tells what it is."""
        begin = self._held.lstrip()
        if self._fresh and begin.startswith(("{", "[", PYTHON_TAG)):
            self._inside, self._fresh = True, False
            return True
        undecided = not begin or (begin != PYTHON_TAG and PYTHON_TAG.startswith(begin))
        if self._fresh and undecided and not last:
            return False
        self._fresh = False
        self._show(self._held, shown)
        self._held = ""
        return False

    def _read_call(self, shown: list[str], calls: list[Call], last: bool) -> bool:
        """Up to where the call ends; False when that is not here yet."""
        block, marker, after = self._whole_block()
        if not marker and not last:
            return False
        found = self._calls_in(block)
        if not found:
            self._show(self._marker + block + marker, shown)
        calls += found
        self._after_call = bool(found)
        self._held, self._inside, self._marker = after, False, ""
        return bool(after)

    def _whole_block(self) -> tuple[str, str, str]:
        if not self._dialect.end:
            return self._held, "", ""
        return self._held.partition(self._dialect.end)

    def _show(self, text: str, shown: list[str]) -> None:
        text = text.lstrip() if self._after_call else text
        if text:
            self._after_call = False
            shown.append(text)

    def _calls_in(self, block: str) -> list[Call]:
        """All of them, or none when there is anything else in the block."""
        rest = block.lstrip(_BETWEEN).removeprefix(PYTHON_TAG).strip(_BETWEEN)
        found: list[Call | None] = []
        while rest:
            try:
                value, end = _decoder.raw_decode(rest)
            except (ValueError, RecursionError):
                return []
            found += [self._call(each) for each in (value if isinstance(value, list) else [value])]
            rest = rest[end:].lstrip(_BETWEEN)
        calls = [call for call in found if call is not None]
        return calls if len(calls) == len(found) else []

    def _call(self, value: Any) -> Call | None:
        if not isinstance(value, dict) or value.get("name") not in self._names:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        if not isinstance(arguments, dict):
            return None
        return Call(self._new_id(), value["name"], json.dumps(arguments, ensure_ascii=False))
