"""`shoal leave`: whom it asks to go, and what it shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from shoal.cli.leave import in_words

from .conftest import Shoal
from .fake_node import FakeNode

# Named shoal, as the real one; it ends on the signal of that number.
PROGRAM = """
import asyncio, signal, sys
async def main():
    count, wanted, ended = 0, int(sys.argv[1]), asyncio.Event()
    def received():
        nonlocal count
        count += 1
        if count == wanted: ended.set()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, received)
    print("up", flush=True)
    await ended.wait()
asyncio.run(main())
"""


@contextmanager
def running(shoal: Shoal, api: str, ends_on: int, name: str = "shoal") -> Iterator[int]:
    """A process that left the note of a node; its id."""
    shoal.home.mkdir(exist_ok=True)
    program = shoal.home / name
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), str(ends_on)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        write_note(shoal.home, process.pid, api)
        yield process.pid
        process.kill()


def write_note(home: Path, pid: int, api: str) -> None:
    (home / "state").mkdir(parents=True, exist_ok=True)
    (home / "state" / "node.json").write_text(json.dumps({"pid": pid, "api": api}))


def test_a_node_that_was_asked_to_leave_is_gone_when_the_command_ends(
    shoal: Shoal, fake_node: FakeNode
) -> None:
    with running(shoal, fake_node.url, ends_on=1):
        result = shoal("leave", asks=False)
    assert result.exit_code == 0
    assert "✓ left" in result.stderr


def test_it_says_what_the_node_waits_for_and_after_a_while_it_waits_no_longer(
    shoal: Shoal, fake_node: FakeNode
) -> None:
    with running(shoal, fake_node.url, ends_on=2):
        result = shoal("leave", "--wait", "0.5", asks=False)
    assert result.exit_code == 0
    assert result.stderr.count("leaving  handing over 2 conversations\n") == 1
    assert "not within 0.5 s: it leaves at once" in result.stderr


def test_without_a_node_there_is_nobody_to_leave(shoal: Shoal) -> None:
    result = shoal("leave", asks=False)
    assert result.exit_code == 3
    assert "no node runs on this machine" in result.stderr


def test_a_process_that_merely_has_the_id_of_a_node_is_left_alone(
    shoal: Shoal, fake_node: FakeNode
) -> None:
    with running(shoal, fake_node.url, ends_on=1, name="editor") as pid:
        assert shoal("leave", asks=False).exit_code == 3
        assert is_running(pid)
    with running(shoal, fake_node.url, ends_on=1) as pid:
        note = shoal.home / "state" / "node.json"
        long_ago = time.time() - 3600

        os.utime(note, (long_ago, long_ago))
        assert shoal("leave", asks=False).exit_code == 3
        assert is_running(pid)


def is_running(pid: int) -> bool:

    return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)


def test_what_a_leaving_node_waits_for_is_said_in_words() -> None:
    assert in_words(0, 0) == ""
    assert in_words(1, 0) == "handing over 1 conversation"
    assert in_words(0, 2) == "2 answers of its own clients may end first"
