"""What people see: tables, ticks and crosses, one JSON line. No escape codes outside a terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from rich.console import Console

COLUMN_GAP = "    "
BAR_HELD, BAR_FREE = "█", "·"


def printable(text: str) -> str:
    """Without control characters: a peer's name or a model's answer moves no cursor."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


def data(text: str) -> None:
    """One piece of the answer, on stdout."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def json_line(value: object) -> None:
    """The machine's form of the answer: one JSON value on one line of stdout."""
    data(msgspec.json.encode(value).decode())


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns, four spaces between them, no rules: as Ollama prints them."""
    lines = [list(headers), *([printable(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        COLUMN_GAP.join(
            cell.ljust(width) for cell, width in zip(line, widths, strict=True)
        ).rstrip()
        for line in lines
    )


def bar(start: int, stop: int, total: int, width: int) -> str:
    """Layers start..stop-1 of `total` over `width` characters; a slice is never invisible."""
    first = start * width // total
    last = max(first + 1, stop * width // total)
    return (BAR_FREE * first + BAR_HELD * (last - first)).ljust(width, BAR_FREE)


def age(seconds: float) -> str:
    """75 -> 'about a minute ago', as users know it from Ollama."""
    for unit, size in (("hour", 3600), ("minute", 60), ("second", 1)):
        count = int(seconds // size)
        if count > 1:
            return f"{count} {unit}s ago"
        if count == 1 and unit != "second":
            return f"about {'an' if unit == 'hour' else 'a'} {unit} ago"
    return "now"


def duration(seconds: float) -> str:
    """How long something has been up: 45 s, 12 min, 3 h, 2 d."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size:.0f} {unit}"
    return f"{seconds:.0f} s"


def note(text: str = "", *, style: str = "") -> None:
    """A line of progress or advice, on stderr."""
    _stderr().print(printable(text), style=style or None, markup=False, soft_wrap=True)


def check(passed: bool, label: str, text: str, *, to_stdout: bool = False) -> None:
    """`✓ label  text` or `✗ label  text`, the tick in colour where the terminal has any."""
    console = _stdout() if to_stdout else _stderr()
    tick, style = ("✓", "green") if passed else ("✗", "bold red")
    console.print(tick, style=style, end=" ", markup=False)
    console.print(f"{label:<9} {printable(text)}", markup=False, soft_wrap=True)


def stream(text: str) -> None:
    """A piece of a running answer, on stdout, at once; terminals get no control characters."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def _stdout() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False)
