"""How a command fails: what and why, what to do, and an exit code.

0 ok · 1 failed · 2 usage · 3 no node runs · 4 no capacity · 5 refused · 130 Ctrl-C · 143 SIGTERM.
A traceback is shown only under SHOAL_DEBUG=1.
"""

from __future__ import annotations

import json
import os
import sys
from types import TracebackType
from typing import Any

import typer
from typer.core import TyperCommand

from ..errors import ShoalError

DEBUG_VARIABLE = "SHOAL_DEBUG"
INTERRUPTED = 130


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM, raised where the main thread is."""

    def __init__(self, signal_number: int) -> None:
        super().__init__()
        self.exit_code = 128 + signal_number


class Command(TyperCommand):
    """Its shoal errors end as two lines on stderr (one of JSON under --json) and an exit code."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except (ShoalError, BaseExceptionGroup) as error:
            cause = single(error)
            if cause is None or debugging():
                raise
            report(cause, as_json=bool(ctx.params.get("as_json")))
            raise typer.Exit(cause.exit_code) from error
        except Stopped as stop:
            raise typer.Exit(stop.exit_code) from None
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None


def single(error: BaseException) -> ShoalError | None:
    """The shoal error inside task groups' wrappings; None when anything else is in there too."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error if isinstance(error, ShoalError) else None


def report(error: ShoalError, *, as_json: bool = False) -> None:
    if as_json:
        body = {"message": error.message, "hint": error.hint, "code": error.code}
        sys.stderr.write(json.dumps({"error": body}, ensure_ascii=False) + "\n")
        return
    from .output import note

    note(f"error: {error.message}", style="red")
    if error.hint:
        note(f"  try: {error.hint}")


def last_resort(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """`sys.excepthook`: what nobody foresaw is a bug of ours, said in two lines."""
    if debugging() or not issubclass(kind, Exception):
        sys.__excepthook__(kind, error, traceback)
        return
    what = f"{kind.__name__}: {error}" if str(error) else kind.__name__
    unforeseen = ShoalError(what, hint="SHOAL_DEBUG=1 shows where it happened; please report it")
    report(unforeseen)


def debugging() -> bool:
    return os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")
