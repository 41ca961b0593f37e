"""`shoal demo` with small HTTP servers in the place of nodes: start, wait, stream, end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from time import monotonic, sleep

import pytest

from shoal.cli import demo
from shoal.errors import InvalidRequest
from shoal.identity import Ticket
from shoal.units import Slice

from .conftest import Shoal
from .fake_node import MODEL_ID

FAKE_NODE = [sys.executable, "-m", "tests.cli.fake_node"]
SLICES = [Slice(0, 3), Slice(3, 6), Slice(6, 8)]


@dataclass
class FakeCheckpoint:
    name: str = "shoal-tiny"
    model_id: str = MODEL_ID
    layers: int = 8


class Started:
    """The arguments of each node process that the demo started."""

    def __init__(self) -> None:
        self.arguments: list[tuple[str, ...]] = []
        self.command = FAKE_NODE

    def shoal_command(self, *arguments: str) -> list[str]:
        self.arguments.append(arguments)
        return self.command


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    noted = Started()
    monkeypatch.setattr(demo, "opened", lambda model, nodes: (FakeCheckpoint(), SLICES[:nodes]))
    monkeypatch.setattr(demo, "shoal_command", noted.shoal_command)
    return noted


def test_the_demo_prints_prompt_and_answer_on_stdout_and_the_rest_on_stderr(
    shoal: Shoal, started: Started
) -> None:
    result = shoal("demo", "def f(n):", asks=False)
    assert result.stdout == "def f(n):    if n < 2: return n\n"
    assert "amber-fox" in result.stderr
    assert "3 tokens" in result.stderr
    assert result.exit_code == 0


def test_the_demo_as_json_is_one_object(shoal: Shoal, started: Started) -> None:
    told = json.loads(shoal("demo", "def f(n):", "--json", asks=False).stdout)
    assert told["model"] == "shoal-tiny"
    assert told["text"] == "    if n < 2: return n"
    assert told["tokens"] == 3
    assert [(one["name"], one["layers"]) for one in told["stages"]] == [
        ("amber-fox", "0:3"),
        ("still-lake", "3:8"),
    ]
    assert {"tokens_per_second", "ttft_s", "startup_s"} <= set(told)


def test_every_node_gets_its_layers_and_only_the_first_runs_the_relay(
    shoal: Shoal, started: Started
) -> None:
    shoal(
        "demo", "--nodes", "3", "--dtype", "f32", "--quant", "int8", "--draft", "none", asks=False
    )
    assert [value_of("--layers", told) for told in started.arguments] == ["0:3", "3:6", "6:8"]
    first, *others = started.arguments
    relay = value_of("--relay-port", first)
    assert not any("--relay-port" in told for told in others)
    tickets = {value_of("--join", told) for told in started.arguments}
    assert Ticket.decode(tickets.pop()).relays == (f"ws://127.0.0.1:{relay}",)
    assert not tickets
    for told in started.arguments:
        assert {"up", "--json", "--exit-with-parent", "--no-lan"} <= set(told)
        assert value_of("--dtype", told) == "f32"
        assert value_of("--quant", told) == "int8"
        assert value_of("--draft", told) == "none"


def value_of(flag: str, arguments: tuple[str, ...]) -> str:
    return arguments[arguments.index(flag) + 1]


def test_a_node_that_dies_at_the_start_ends_the_demo_with_its_words(
    shoal: Shoal, started: Started
) -> None:
    started.command = [sys.executable, "-c", "import sys; sys.exit('error: torch is missing')"]
    result = shoal("demo", asks=False)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "error: torch is missing" in result.stderr


def test_more_nodes_than_layers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.models.checkpoint.open_checkpoint", lambda name: FakeCheckpoint())
    with pytest.raises(InvalidRequest, match="8 layers, too few for 9 nodes"):
        demo.opened("shoal-tiny", 9)


KEPT = """
import sys
from shoal.cli import app, demo
from tests.cli.test_demo import FAKE_NODE, SLICES, FakeCheckpoint
demo.opened = lambda model, nodes: (FakeCheckpoint(), SLICES)
demo.shoal_command = lambda *told: FAKE_NODE
sys.argv = ["shoal", "demo", "--keep"]
app.main()
"""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_whatever_ends_the_demo_leaves_no_process(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path), "SHOAL_MARK": "x"}
    with subprocess.Popen(
        [sys.executable, "-c", KEPT],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        until_kept(process)
        children = sessions_under(tmp_path)
        assert len(children) == 3
        process.send_signal(number)
        drain = Thread(target=process.stderr.read)
        drain.start()
        assert process.wait(10) == code
        drain.join()
    deadline = monotonic() + 5
    while number == signal.SIGKILL and any(map(alive, children)) and monotonic() < deadline:
        sleep(0.02)  # they notice the closed pipe by themselves
    assert not any(map(alive, children))
    assert number == signal.SIGKILL or not list(tmp_path.iterdir())


def until_kept(process: subprocess.Popen[str]) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if "Ctrl-C ends it" in line:
            return
    raise AssertionError("the demo ended too early")


def sessions_under(home: Path) -> list[int]:
    """Processes whose SHOAL_HOME lies under `home`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes()
        except OSError:
            continue
        if f"SHOAL_HOME={home}".encode() in environment:
            found.append(int(folder.name))
    return found


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"
