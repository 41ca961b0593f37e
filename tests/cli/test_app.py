"""The program as a whole: how quickly it says what it can do, and how it fails."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import TracebackType

import pytest

from shoal import __version__
from shoal.cli.failure import last_resort, single
from shoal.errors import NoCapacity

from .conftest import Shoal
from .fake_node import FakeNode

COMMANDS = ("up", "demo", "run", "invite", "show", "ps", "peers", "map", "status", "doctor", "id")
HEAVY = ("torch", "transformers", "nostr_sdk", "uvicorn", "httpx", "pydantic")


def program(
    *arguments: str, home: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables, "SHOAL_HOME": str(home or "/nonexistent")}
    return subprocess.run(
        [sys.executable, "-m", "shoal", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        stdin=subprocess.DEVNULL,
    )


def test_help_names_every_command(shoal: Shoal) -> None:
    text = shoal("--help", asks=False).stdout
    for name in COMMANDS:
        assert f" {name} " in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_and_knows_json(shoal: Shoal, command: str) -> None:
    result = shoal(command, "--help", asks=False)
    assert result.exit_code == 0
    assert "--json" in result.stdout


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    listing = (
        f"import sys; from shoal.cli import app; print([m for m in {HEAVY} if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True)
    assert found.stdout == "[]\n"
    assert min(cpu_seconds("--help") for _ in range(2)) < 1.0  # 0.5 s is the aim


def cpu_seconds(*arguments: str) -> float:
    """Of a whole run: other work on this machine slows the clock, but not this."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert program(*arguments).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_the_version_is_one_line(shoal: Shoal) -> None:
    assert shoal("--version", asks=False).stdout == f"shoal {__version__}\n"


def test_an_unknown_command_is_a_usage_error(shoal: Shoal) -> None:
    assert shoal("swim", asks=False).exit_code == 2


def test_a_pipe_gets_no_escape_codes(fake_node: FakeNode, tmp_path: Path) -> None:
    for query in ("status", "ps"):
        told = program(query, "--api", fake_node.url, home=tmp_path)
        assert told.returncode == 0
        assert "\x1b" not in told.stdout + told.stderr


def test_a_wide_table_is_not_wrapped_in_a_pipe(fake_node: FakeNode, tmp_path: Path) -> None:
    told = program("peers", "--api", fake_node.url, home=tmp_path, COLUMNS="40")
    assert len(told.stdout.splitlines()) == 3


def test_the_shoal_error_inside_a_task_group_is_the_one_shown() -> None:
    error = NoCapacity("no room")
    assert single(ExceptionGroup("tasks", [ExceptionGroup("inner", [error])])) is error
    assert single(ExceptionGroup("tasks", [error, ValueError()])) is None


def test_a_bug_is_said_in_two_lines(capsys: pytest.CaptureFixture[str]) -> None:
    last_resort(KeyError, KeyError("x"), no_traceback())
    told = capsys.readouterr().err
    assert told.startswith("error: KeyError: 'x'\n  try: SHOAL_DEBUG=1")


def test_a_bug_under_debug_is_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_DEBUG", "1")
    last_resort(KeyError, KeyError("x"), no_traceback())
    assert capsys.readouterr().err == "KeyError: 'x'\n"


def no_traceback() -> TracebackType | None:
    return None


def test_the_id_is_made_once_and_kept(shoal: Shoal) -> None:
    first = json.loads(shoal("id", "--json", asks=False).stdout)
    assert first["node"].startswith("npub1")
    assert shoal("id", asks=False).stdout.split() == [first["node"], first["name"]]


def test_ctrl_c_before_the_command_took_over_is_130_without_traceback() -> None:
    early = (
        "import sys; from shoal import cli\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'shoal.cli.app': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted()); cli.run()"
    )
    ended = subprocess.run([sys.executable, "-c", early], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (130, "")
