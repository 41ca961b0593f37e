"""The text that the built-in model learns from: the Python standard library of this machine.

Knows: which files count, which of them are held out, how a file becomes text.
Does not know: tokens, models, training.
"""

from __future__ import annotations

import hashlib
import sysconfig
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

TESTS = {"test", "tests", "idle_test"}
GENERATED = {"encodings", "pydoc_data"}  # character tables, and documentation quoted line by line
INSTALLED = {"site-packages", "dist-packages"}
HELD_OUT_PERCENT = 5


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One module: its path relative to the standard library, with forward slashes, and its text."""

    path: str
    text: str

    @property
    def held_out(self) -> bool:
        """Decided by the path alone, so that every machine and every version holds out the same."""
        digest = hashlib.sha256(self.path.encode()).digest()
        return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT

    @property
    def byte_count(self) -> int:
        return len(self.text.encode())


def standard_library() -> list[SourceFile]:
    """Every hand-written module of the standard library, in the order of the paths."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in root.rglob("*.py") if _counts(path.relative_to(root)))
    return [SourceFile(path.relative_to(root).as_posix(), _read(path)) for path in paths]


def split(files: Iterable[SourceFile]) -> tuple[list[SourceFile], list[SourceFile]]:
    """(files to train on, files held out)."""
    files = list(files)
    return [f for f in files if not f.held_out], [f for f in files if f.held_out]


def _counts(path: Path) -> bool:
    excluded = not (TESTS | GENERATED | INSTALLED).isdisjoint(path.parts)
    return not excluded and not path.name.startswith("_sysconfigdata")


def _read(path: Path) -> str:
    """The text as Python reads it: declared encoding, newlines as ``\\n``."""
    with tokenize.open(path) as file:
        return file.read()
