"""Node processes that this process started, and that never outlive it.

Each child leads a process group of its own, so that a Ctrl-C in the terminal reaches only us and
we end them in order. Its stdin is a pipe from us: `shoal up --exit-with-parent` leaves when that
pipe closes, which happens even when we are killed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import IO

import msgspec

from ..errors import LocalError
from .signals import Interruptible

LEAVE_S = 3.0  # what a child may take to say goodbye
TAIL_LINES = 8


class Ready(msgspec.Struct, frozen=True):
    """The line that `shoal up --json` prints once the node is up."""

    node: str
    name: str
    api: str
    ticket: str | None = None
    relay: str | None = None


class Told(msgspec.Struct, frozen=True):
    message: str
    hint: str = ""


class Failure(msgspec.Struct, frozen=True):
    """The line with which a command under --json fails."""

    error: Told


class Child:
    """One `shoal up` process; its home holds all that it writes."""

    def __init__(self, label: str, home: Path, process: subprocess.Popen[bytes]) -> None:
        self.label = label
        self._home = home
        self._process = process

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    @property
    def ready(self) -> Ready | None:
        """What it said about itself; None as long as it has not."""
        line, newline, _ = stdout_of(self._home).read_bytes().partition(b"\n")
        return msgspec.json.decode(line, type=Ready) if newline else None

    def failure(self) -> LocalError:
        """Why it ended, in its own words: the error it told us, else the end of its stderr."""
        said = stderr_of(self._home).read_text(errors="replace")
        lines = [line for line in said.splitlines() if line.strip()][-TAIL_LINES:]
        try:
            told = msgspec.json.decode(lines[-1], type=Failure).error
        except (IndexError, msgspec.DecodeError):
            why, hint = "\n".join(lines) or "it said nothing", "shoal doctor"
            return LocalError(
                f"{self.label} ended with exit code {self.exit_code}: {why}", hint=hint
            )
        return LocalError(f"{self.label} ended: {told.message}", hint=told.hint)

    def ask_to_leave(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._signal(signal.SIGTERM)

    def end(self, patience_s: float) -> None:
        """Wait for it, then kill whatever is left of its process group."""
        try:
            self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self._process.pid, number)
        except (ProcessLookupError, PermissionError):
            return  # the whole group is gone already (macOS says it the second way)


class Children:
    """The node processes of one command. Made by `sandbox`, which ends them whatever happened."""

    def __init__(self, signals: Interruptible, home: Path) -> None:
        self._signals = signals
        self._home = home
        self._children: list[Child] = []

    def start(self, label: str, command: Sequence[str]) -> Child:
        """Run `command` under SHOAL_HOME = a fresh folder of our home named `label`."""
        home = self._home / label
        home.mkdir(mode=0o700)
        with (
            self._signals.held(),
            stdout_of(home).open("wb") as out,
            stderr_of(home).open("wb") as err,
        ):
            child = Child(
                label, home, spawn(command, child_environment(os.environ, home), out, err)
            )
            self._children.append(child)
        return child

    def check(self) -> None:
        """Raises the failure of a child that ended before its time."""
        for child in self._children:
            if child.exit_code is not None:
                raise child.failure()

    def end(self) -> None:
        """Ask all to leave at once; kill those that have not within LEAVE_S."""
        deadline = monotonic() + LEAVE_S
        for child in self._children:
            child.ask_to_leave()
        for child in self._children:
            child.end(max(0.0, deadline - monotonic()))


@contextmanager
def sandbox() -> Iterator[Children]:
    """Children with homes in a temporary folder. Afterwards neither processes nor files are left,
    also when SIGINT or SIGTERM came at any moment (raised inside as Stopped)."""
    with Interruptible() as signals:
        with signals.held():
            home = Path(tempfile.mkdtemp(prefix="shoal-"))
        children = Children(signals, home)
        try:
            yield children
        finally:
            with signals.held():
                children.end()
                shutil.rmtree(home, ignore_errors=True)


def spawn(
    command: Sequence[str], environment: Mapping[str, str], out: IO[bytes], err: IO[bytes]
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(  # noqa: S603 (our own program with our own arguments)
        command,
        stdin=subprocess.PIPE,
        stdout=out,
        stderr=err,
        env=dict(environment),
        start_new_session=True,
    )


def shoal_command(*arguments: str) -> list[str]:
    """This very shoal, in a process of its own."""
    return [sys.executable, "-m", "shoal", *arguments]


def child_environment(environment: Mapping[str, str], home: Path) -> dict[str, str]:
    """Ours without the user's SHOAL_* settings: the flags of the child say everything."""
    kept = {name: value for name, value in environment.items() if not name.startswith("SHOAL_")}
    return {**kept, "SHOAL_HOME": str(home)}


def stdout_of(home: Path) -> Path:
    return home / "stdout.json"


def stderr_of(home: Path) -> Path:
    return home / "stderr.log"
