"""How nodes find each other, by multicast or ticket, and how they share out a model."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from .live import LiveNode, everyone_sees_everyone, model_is_ready, ready_line, start_node, wait_for

pytestmark = pytest.mark.e2e


@contextmanager
def started(folder: Path, name: str, *options: str, lan: bool = False) -> Iterator[LiveNode]:
    process = start_node(folder / name, *options, lan=lan)
    try:
        node = LiveNode(process, folder / name, "", {})
        node.ready = wait_for("a node starts", lambda: ready_line(process, node.home))
        yield node
    finally:
        end(process)


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


def held(node: LiveNode) -> list[str]:
    return [stage["layers"] for stage in node.status()["stages"] if stage["state"] == "serving"]


def test_nodes_of_one_network_meet_without_being_told_anything(tmp_path: Path) -> None:
    with (
        started(tmp_path, "one", "--no-serve", "--mesh", "e2e-lan", lan=True) as one,
        started(tmp_path, "two", "--no-serve", "--mesh", "e2e-lan", lan=True) as two,
        started(tmp_path, "other", "--no-serve", "--mesh", "e2e-other", lan=True) as other,
    ):
        wait_for("two nodes meet", lambda: everyone_sees_everyone([one, two]), 30)
        assert everyone_sees_everyone([other])


def test_a_ticket_lets_a_second_machine_into_a_private_mesh(tmp_path: Path) -> None:
    with started(tmp_path, "host", "--private", "--model", "shoal-tiny") as host:
        ticket = httpx.get(f"{host.api}/v1/node?ticket=1").json()["ticket"]
        assert host.status()["ticket"] is None, "a ticket is told only when asked for"
        with started(tmp_path, "guest", "--no-serve", "--join", ticket) as guest:
            wait_for("the guest sees the model", lambda: model_is_ready(guest))
            body = {"model": "shoal-tiny", "prompt": "import ", "max_tokens": 4}
            answer = httpx.post(f"{guest.api}/v1/completions", json=body, timeout=60)
            assert answer.json()["usage"]["completion_tokens"] == 4


def test_small_nodes_share_out_a_model_that_none_could_hold(tmp_path: Path) -> None:
    """7 MB a node for 11 MB of weights: each holds some layers, together they hold all."""
    small = ["--memory", "7MB", "--kv-tokens", "256", "--model", "shoal-tiny", "--private"]
    with started(tmp_path, "first", *small) as first:
        ticket = httpx.get(f"{first.api}/v1/node?ticket=1").json()["ticket"]
        joining = [*small[:-1], "--join", ticket]
        with started(tmp_path, "second", *joining) as second:
            wait_for("the model is covered", lambda: model_is_ready(first), 60)
            assert held(first) != ["0:8"]
            assert held(second) != ["0:8"]
            body = {"model": "shoal-tiny", "prompt": "import ", "max_tokens": 4}
            answer = httpx.post(f"{first.api}/v1/completions", json=body, timeout=60)
            assert answer.json()["usage"]["completion_tokens"] == 4
