"""`shoal demo` as a stranger runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from .live import wait_for

pytestmark = pytest.mark.e2e

DEMO = [sys.executable, "-m", "shoal", "demo"]


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "SHOAL_HOME": str(home)}


def test_the_demo_answers_with_a_model_spread_over_three_nodes(tmp_path: Path) -> None:
    done = subprocess.run(
        [*DEMO, "def fibonacci(n):", "--json", "--max-tokens", "24"],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["model"] == "shoal-tiny"
    assert said["text"].strip()
    assert said["tokens"] == 24
    assert len({stage["name"] for stage in said["stages"]}) == 3
    bounds = [tuple(map(int, stage["layers"].split(":"))) for stage in said["stages"]]
    assert [bounds[0][0], bounds[-1][1]] == [0, 8]
    assert all(before[1] == after[0] for before, after in pairwise(bounds))
    assert said["tokens_per_second"] > 0
    assert said["ttft_s"] > 0


@pytest.mark.parametrize("moment", ["while it starts", "while it is kept"])
def test_ctrl_c_leaves_no_process_behind(tmp_path: Path, moment: str) -> None:
    demo = subprocess.Popen(
        [*DEMO, "--keep", "--max-tokens", "8"],
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert demo.stderr is not None
    children: list[psutil.Process] = []
    wait_for("three nodes start", lambda: len(psutil.Process(demo.pid).children()) == 3)
    children = psutil.Process(demo.pid).children(recursive=True)
    if moment == "while it is kept":
        for line in demo.stderr:
            if "Ctrl-C" in line:
                break
    demo.send_signal(signal.SIGINT)
    demo.communicate(timeout=30)
    assert demo.returncode == 130
    wait_for("every node has ended", lambda: not any(map(psutil.pid_exists, pids(children))), 5)


def test_a_killed_demo_takes_its_nodes_with_it(tmp_path: Path) -> None:
    demo = subprocess.Popen(
        [*DEMO, "--keep"],
        env=environment(tmp_path),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for("three nodes start", lambda: len(psutil.Process(demo.pid).children()) == 3)
    children = psutil.Process(demo.pid).children(recursive=True)
    demo.kill()
    demo.wait()
    wait_for("every node has ended", lambda: not any(map(psutil.pid_exists, pids(children))), 20)


def pids(processes: list[psutil.Process]) -> list[int]:
    return [process.pid for process in processes]
