"""Processes that never outlive the one that started them. Real processes: small Python programs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep

import pytest

from shoal.cli.children import Child, Ready, child_environment, sandbox
from shoal.cli.failure import Stopped
from shoal.errors import LocalError

PATIENCE_S = 10.0
SAY_READY = (
    """print('{"node": "npub1x", "name": "amber-fox", "api": "http://127.0.0.1:1"}', flush=True)"""
)
WAIT_FOR_EOF = "import sys; sys.stdin.read()"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True)"
    "\nwhile True: time.sleep(1)"
)


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def until(probe: Callable[[], object]) -> None:
    deadline = monotonic() + PATIENCE_S
    while not probe():
        assert monotonic() < deadline, "waited too long"
        sleep(0.01)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def pid_of(child: Child) -> int:
    return child._process.pid


def test_children_are_gone_after_the_sandbox_and_so_are_their_files() -> None:
    with sandbox() as children:
        child = children.start("node-1", python(f"{SAY_READY}; {WAIT_FOR_EOF}"))
        home = child._home
        until(lambda: child.ready)
    assert child.exit_code is not None
    assert not home.exists()


def test_what_a_child_says_when_it_is_ready_can_be_read() -> None:
    with sandbox() as children:
        child = children.start("node-1", python(f"{SAY_READY}; {WAIT_FOR_EOF}"))
        until(lambda: child.ready)
        assert child.ready == Ready("npub1x", "amber-fox", "http://127.0.0.1:1")


def test_a_child_that_does_not_listen_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.cli.children.LEAVE_S", 0.1)
    with sandbox() as children:
        child = children.start("node-1", python(STUBBORN))
        until(lambda: b"deaf" in (child._home / "stdout.json").read_bytes())
    assert child.exit_code == -signal.SIGKILL


def test_the_children_of_a_child_end_with_it() -> None:
    program = f"""
import subprocess, sys
inner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open("inner.pid", "w").write(str(inner.pid))
{WAIT_FOR_EOF}
"""
    with sandbox() as children:
        child = children.start(
            "node-1", ["sh", "-c", 'cd "$SHOAL_HOME" && exec "$0" -c "$1"', sys.executable, program]
        )
        written = child._home / "inner.pid"
        until(lambda: written.exists() and written.read_text())
        inner = int(written.read_text())
    until(lambda: not alive(inner) or is_zombie(inner))


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] == "Z"
    except OSError:
        return True


def test_a_child_that_dies_early_is_reported_with_its_last_words() -> None:
    with sandbox() as children:
        children.start("node-1", python("import sys; sys.exit('no room for layers 0:4')"))
        with pytest.raises(
            LocalError, match=r"(?s)node-1 ended with exit code 1.*no room for layers"
        ):
            until(children.check)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_children_and_has_its_exit_code(number: signal.Signals) -> None:
    started: list[Child] = []

    def interrupted() -> None:
        with sandbox() as children:
            started.append(children.start("node-1", python(WAIT_FOR_EOF)))
            os.kill(os.getpid(), number)
            sleep(PATIENCE_S)

    with pytest.raises(Stopped) as stopped:
        interrupted()
    assert stopped.value.exit_code == 128 + number
    assert started[0].exit_code is not None


def test_a_signal_while_a_child_starts_waits_until_it_can_be_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from shoal.cli import children as module

    started: list[subprocess.Popen[bytes]] = []

    def spawn_then_interrupt(*arguments: object) -> subprocess.Popen[bytes]:
        started.append(real_spawn(*arguments))  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGINT)
        return started[-1]

    real_spawn = module.spawn
    monkeypatch.setattr(module, "spawn", spawn_then_interrupt)
    with pytest.raises(Stopped), sandbox() as running:
        running.start("node-1", python(WAIT_FOR_EOF))
    assert started[0].returncode is not None


def test_afterwards_signals_mean_what_they_meant_before() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with sandbox():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_children_get_a_home_of_their_own_and_none_of_our_settings() -> None:
    environment = child_environment(
        {"SHOAL_API_KEY": "x", "HF_HOME": "/hf"}, Path("/somewhere/one")
    )
    assert environment == {"HF_HOME": "/hf", "SHOAL_HOME": "/somewhere/one"}
