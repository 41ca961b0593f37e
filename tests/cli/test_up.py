"""`shoal up` around a node that only waits: flags, what is shown, how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest

from shoal.cli import up
from shoal.cli.board import Board
from shoal.errors import InvalidRequest, NoCapacity, ShoalError
from shoal.events import (
    EventHub,
    Leaving,
    NodeGone,
    NodeSeen,
    PeerFault,
    RelayChanged,
    StageChanged,
)
from shoal.identity import Ticket
from shoal.units import ModelId, NodeId, Slice

from .conftest import Shoal
from .fake_node import AMBER, LAKE, MODEL_ID, NODE, TICKET


class IdleNode:
    """A node as `shoal up` sees it. When up, it sends its own process the signal of the test."""

    sends: int | None = signal.SIGTERM
    dies_of: ShoalError | None = None
    left = False

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.events, self.hurry = EventHub(), asyncio.Event()
        self.identity = SimpleNamespace(node=AMBER, name="amber-fox")
        self.name, self.api_url, self.relay_url = "amber-fox", "http://127.0.0.1:7470", None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        type(self).left = True

    def ticket(self) -> SimpleNamespace:
        return SimpleNamespace(encode=lambda: TICKET)

    def status(self) -> dict[str, Any]:
        return deepcopy(NODE)

    async def wait_serving(self) -> None:
        if self.dies_of:
            raise self.dies_of

    async def run_until(self, stop: asyncio.Event) -> None:
        if self.dies_of:
            raise self.dies_of
        os.kill(os.getpid(), self.sends or signal.SIGTERM)
        await stop.wait()


class Told:
    """What the command line handed to `node_config`."""

    settings: Any
    extras: dict[str, Any]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    noted = Told()

    def node_config(settings: Any, **extras: Any) -> SimpleNamespace:
        noted.settings, noted.extras = settings, extras
        return SimpleNamespace(folders=settings.folders)

    fakes = SimpleNamespace(Node=IdleNode, node_config=node_config)
    monkeypatch.setitem(sys.modules, "shoal.node", fakes)  # type: ignore[arg-type]
    monkeypatch.setattr(IdleNode, "left", False)
    return noted


def test_up_shows_device_identity_mesh_and_address(shoal: Shoal, told: Told) -> None:
    result = shoal("up", asks=False)
    assert result.exit_code == 0
    assert result.stdout == ""
    for part in ("✓ device", "2 cores", "✓ identity", AMBER, "(new)", "✓ mesh", "1 of 2 relays"):
        assert part in result.stderr
    assert "API  http://127.0.0.1:7470/v1" in result.stderr
    assert IdleNode.left


def test_up_as_json_says_once_where_it_is(shoal: Shoal, told: Told) -> None:
    result = shoal("up", "--json", asks=False)
    assert json.loads(result.stdout) == {
        "node": AMBER,
        "name": "amber-fox",
        "api": "http://127.0.0.1:7470",
        "ticket": TICKET,
        "relay": None,
    }


def test_ctrl_c_leaves_in_order_and_says_130(
    shoal: Shoal, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(IdleNode, "sends", signal.SIGINT)
    assert shoal("up", asks=False).exit_code == 130
    assert IdleNode.left


def test_what_a_node_dies_of_is_the_error_that_is_shown(
    shoal: Shoal, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(IdleNode, "dies_of", NoCapacity("no room", hint="--layers 0:2"))
    result = shoal("up", asks=False)
    assert result.exit_code == 4
    assert "error: no room\n  try: --layers 0:2" in result.stderr
    assert IdleNode.left


def test_flags_become_settings(shoal: Shoal, told: Told) -> None:
    shoal(
        *("up", "--model", "m", "--layers", "0:4", "--dtype", "f32", "--threads", "2"),
        *("--relay", "ws://a", "--relay", "wss://b", "--host", "::1", "--port", "0", "--no-lan"),
        *("--listen", "[::1]:7471", "--memory", "2GB", "--kv-tokens", "64", "--api-key", "k"),
        *("--mesh", "pond", "--no-serve", "--relay-port", "7447", "--quant", "none"),
        *("--draft", "small", "--device", "cuda:1"),
        asks=False,
    )
    settings = told.settings
    assert (settings.model, settings.layers, settings.dtype) == ("m", "0:4", "f32")
    assert settings.relays == ("ws://a", "wss://b")
    assert (settings.api_host, settings.api_port, settings.api_key) == ("::1", 0, "k")
    assert (settings.listen_host, settings.listen_port) == ("::1", 7471)
    assert (settings.threads, settings.memory, settings.kv_tokens) == (2, "2GB", 64)
    assert (settings.draft, settings.device) == ("small", "cuda:1")
    assert (settings.lan, settings.mesh, settings.quant) == (False, "pond", "none")
    assert told.extras == {"ticket": None, "private": False, "serve": False, "relay_port": 7447}


def test_a_ticket_is_read_and_a_damaged_one_refused(shoal: Shoal, told: Told) -> None:
    ticket = Ticket(mesh="pond", relays=("ws://127.0.0.1:1",))
    shoal("up", "--join", ticket.encode(), asks=False)
    assert told.extras["ticket"] == ticket
    result = shoal("up", "--join", ticket.encode()[:-3] + "AAA", asks=False)
    assert result.exit_code == 2
    assert "damaged" in result.stderr


def test_a_setting_of_the_wrong_kind_is_a_usage_error(shoal: Shoal, told: Told) -> None:
    result = shoal("up", "--dtype", "f64", asks=False)
    assert result.exit_code == 2
    assert "dtype" in result.stderr


@pytest.mark.parametrize("written", ["7471", ":7471", "host:", "host:x", "host:70000"])
def test_an_address_to_listen_on_has_host_and_port(written: str) -> None:
    with pytest.raises(InvalidRequest, match="no address to listen on"):
        up.split_listen(written)


def test_layers_that_are_no_range_are_refused_before_anything_starts(shoal: Shoal) -> None:
    result = shoal("up", "--model", "m", "--layers", "4-8", asks=False)
    assert result.exit_code == 2
    assert "not a range of layers" in result.stderr


def test_the_board_has_one_line_for_each_change(capsys: pytest.CaptureFixture[str]) -> None:
    board = Board(IdleNode({}))  # type: ignore[arg-type]
    lake, model = NodeId(LAKE), ModelId(MODEL_ID)
    for event in (
        NodeSeen(lake, "still-lake"),
        StageChanged(model, Slice(0, 3), "joining"),
        StageChanged(model, Slice(0, 3), "serving"),
        RelayChanged("ws://a", connected=False),
        PeerFault(None, "bad_frame", 1),
        NodeGone(lake, "silent"),
    ):
        board.show(event)
    assert capsys.readouterr().err.splitlines() == [
        "✓ joined    still-lake",
        "  loading  shoal-tiny layers 0:3 ...",
        "✓ serving   shoal-tiny layers 0:3",
        "✗ relay     ws://a is down, trying again",
        "✗ dropped   a stranger: bad_frame",
        "✗ gone      still-lake: silent",
    ]


def test_a_board_says_what_a_leaving_node_waits_for(capsys: pytest.CaptureFixture[str]) -> None:
    node = IdleNode({})
    board = Board(node)  # type: ignore[arg-type]
    board.leave()
    for event in (
        NodeGone(NodeId(LAKE), "silent"),
        Leaving(3, 1),
        Leaving(0, 2),
        Leaving(0, 0),
    ):
        board.show(event)
    board.hurry()
    assert node.hurry.is_set()
    assert capsys.readouterr().err.splitlines() == [
        "  leaving  the mesh is told; Ctrl-C once more leaves at once",
        "  leaving  handing over 3 conversations, 1 answer of its own clients may end first ...",
        "  leaving  2 answers of its own clients may end first ...",
        "  leaving  at once: what still runs here breaks off",
    ]


@pytest.mark.parametrize("stuck", [False, True])
def test_a_second_signal_hurries_and_ends_by_force_what_does_not_hear(stuck: bool) -> None:
    program = (
        "import asyncio, sys, time; from shoal.cli import ending; ending.AT_ONCE_S = 0.1\n"
        "async def main():\n"
        "    hurry = asyncio.Event(); signals = ending.Ending(hurry.set)\n"
        "    print('up', flush=True); await signals.asked.wait()\n"
        "    print('leaving', flush=True); await hurry.wait()\n"
        f"    time.sleep({60 if stuck else 0})\n"
        "asyncio.run(main())"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in ("up\n", "leaving\n"):
            assert process.stdout.readline() == line
            process.send_signal(signal.SIGINT)
        assert process.wait(10) == (128 + signal.SIGINT if stuck else 0)


def test_a_node_ends_when_its_parent_is_gone(tmp_path: Path) -> None:
    """Stuck in a call that hears no signal, it is ended by force."""
    program = (
        "import signal, time; from shoal.cli import ending; ending.PARENT_PATIENCE_S = 0.05\n"
        "signal.signal(signal.SIGTERM, lambda *_: None); ending.leave_with_parent()\n"
        "while True: time.sleep(0.01)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE) as process:
        assert process.poll() is None
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(10) == 128 + signal.SIGTERM


def test_a_backend_is_told_by_flags_and_never_shown(
    shoal: Shoal, told: Told, tmp_path: Path
) -> None:
    flags = ["--model", "m", "--backend", "http://10.1.2.3:8000", "--backend-slots", "4"]
    result = shoal("up", *flags, "--backend-model", "theirs", "--backend-key-file", "k", asks=False)
    assert result.exit_code == 0
    assert told.settings.backend == "http://10.1.2.3:8000"
    assert (told.settings.backend_slots, told.settings.backend_model) == (4, "theirs")
    assert told.settings.backend_key_file == "k"
    assert "10.1.2.3" not in result.stdout + result.stderr + repr(told.settings)
