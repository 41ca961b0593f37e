"""`shoal leave`: the node on this machine hands over what it computes, and goes."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import LocalError, NotRunning, ShoalError
from .client import NodeClient
from .options import ApiKey
from .output import check, note
from .reports import NodeReport

if TYPE_CHECKING:
    import psutil

POLL_S = 0.2
AT_ONCE_S = 5.0  # for a node that was told not to wait
CLOCK_S = 2.0  # two clocks of one machine may differ by


def leave(
    wait: Annotated[
        float, typer.Option(min=0, metavar="S", help="For what runs on it; then it leaves at once.")
    ] = 60.0,
    api_key: ApiKey = None,
) -> None:
    """Let the node on this machine leave its mesh: running answers go on, on other nodes."""
    from ..config import load_settings

    settings = load_settings({"api_key": api_key})
    running = find(settings.folders.runtime_file)
    client = NodeClient(running.api, settings.api_key)
    running.ask_to_leave()
    if not running.ends_within(wait, Teller(client).tell):
        note(f"  not within {wait:g} s: it leaves at once")
        running.ask_to_leave()
        if not running.ends_within(AT_ONCE_S, lambda: None):
            raise LocalError(
                f"process {running.process.pid} does not end", hint=f"kill -9 {running.process.pid}"
            )
    check(True, "left", "the node has ended")


@dataclass(frozen=True)
class Running:
    """The process of a node, and its API."""

    process: psutil.Process
    api: str

    def ask_to_leave(self) -> None:
        """As Ctrl-C does; the second time means at once."""
        if is_alive(self.process):
            os.kill(self.process.pid, signal.SIGTERM)

    def ends_within(self, seconds: float, meanwhile: Callable[[], None]) -> bool:
        until = time.monotonic() + seconds
        while is_alive(self.process):
            if time.monotonic() >= until:
                return False
            meanwhile()
            time.sleep(POLL_S)
        return True


def find(runtime_file: Path) -> Running:
    """By the note that a node leaves when it starts. Its process id may be another's by now: then
    that began after the note was written. Raises NotRunning.
    """
    import psutil

    try:
        told = json.loads(runtime_file.read_text())
        process, api = psutil.Process(int(told["pid"])), str(told["api"])
        written = runtime_file.stat().st_mtime
        ours = process.create_time() <= written + CLOCK_S and is_shoal(process)
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        ours = False
    if not ours or not is_alive(process):
        raise NotRunning("no node runs on this machine", hint="shoal up")
    return Running(process, api)


def is_shoal(process: psutil.Process) -> bool:
    """`shoal up`, `python -m shoal up`: by the name of the program that runs."""
    return any("shoal" in Path(part).name for part in process.cmdline()[:6])


def is_alive(process: psutil.Process) -> bool:
    import psutil

    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


class Teller:
    """One line for each change of what the node waits for."""

    def __init__(self, client: NodeClient) -> None:
        self._client, self._said = client, ""

    def tell(self) -> None:
        try:
            says = waits_for(self._client.node())
        except ShoalError:  # its API may be gone already, or want a key that we have not
            return
        if says and says != self._said:
            note(f"  leaving  {says}")
        self._said = says


def waits_for(report: NodeReport) -> str:
    """'3 conversations are handed over, 1 answer of its own ends first'; "" without any."""
    return in_words(sum(stage.sessions for stage in report.stages), report.answers)


def in_words(sessions: int, answers: int) -> str:
    """What a leaving node waits for; "" for nothing."""
    parts = []
    if sessions:
        parts.append(f"handing over {counted(sessions, 'conversation')}")
    if answers:
        parts.append(f"{counted(answers, 'answer')} of its own clients may end first")
    return ", ".join(parts)


def counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count != 1 else ''}"
