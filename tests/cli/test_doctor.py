from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from shoal.cli import doctor, engine_check

from .conftest import Shoal
from .fake_node import FakeNode


@pytest.fixture(autouse=True)
def engine_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether this machine has torch is not what most of these tests are about."""
    monkeypatch.setattr(engine_check, "find_spec", lambda name: object())
    monkeypatch.setattr(engine_check, "version", lambda name: "1.0")
    monkeypatch.setattr(doctor, "MIN_FREE_BYTES", 0)


def findings(shoal: Shoal) -> dict[str, doctor.Finding]:
    told = json.loads(shoal("doctor", "--json").stdout)
    return {one["check"]: doctor.Finding(**one) for one in told}


def test_a_relay_that_is_down_fails_the_check(shoal: Shoal) -> None:
    result = shoal("doctor")
    assert result.exit_code == 1
    assert "✓ node" in result.stdout
    assert "✗ relay     wss://gone.example refused" in result.stdout
    assert "try: check the network" in result.stderr


def test_a_healthy_machine_passes(shoal: Shoal, fake_node: FakeNode) -> None:
    fake_node.node["relays"] = []
    result = shoal("doctor")
    assert result.exit_code == 0
    assert "✗" not in result.stdout


def test_an_identity_that_others_can_read_is_named_with_its_fix(shoal: Shoal) -> None:
    shoal("id", asks=False)
    assert findings(shoal)["identity"].passed
    file = shoal.home / "identity"
    file.chmod(0o644)
    found = findings(shoal)["identity"]
    assert not found.passed
    assert found.fix == f"chmod 600 {file}"


def test_a_misspelt_variable_is_named(shoal: Shoal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_MODLE", "x")
    monkeypatch.setenv("SHOAL_DEBUG", "0")
    found = findings(shoal)["settings"]
    assert not found.passed
    assert "SHOAL_MODLE" in found.found
    assert "SHOAL_DEBUG" not in found.found


def test_without_the_engine_the_exact_install_line_is_the_fix(
    shoal: Shoal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_check, "find_spec", lambda name: None)
    found = findings(shoal)["engine"]
    assert not found.passed
    assert "torch" in found.found
    assert '-m pip install "' in found.fix
    assert "torch<2.14,>=2.8" in found.fix or "torch>=2.8,<2.14" in found.fix


def test_a_machine_without_gpu_gets_the_small_wheels() -> None:
    line = engine_check.pip_line("python", ["torch>=2.8"], plain_torch=False)
    assert line == f'python -m pip install "torch>=2.8" --extra-index-url {engine_check.CPU_WHEELS}'
    assert "index" not in engine_check.pip_line("python", ["torch>=2.8"], plain_torch=True)


@pytest.mark.parametrize(
    ("behind_s", "told"),
    [(181.4, "181 s behind the mesh's"), (-60.0, "60 s ahead of the mesh's")],
)
def test_a_clock_that_is_wrong_is_named_with_what_to_do(
    shoal: Shoal, fake_node: FakeNode, behind_s: float, told: str
) -> None:
    assert findings(shoal)["clock"].passed
    fake_node.node["clock_behind_s"] = behind_s
    found = findings(shoal)["clock"]
    assert (found.passed, found.found) == (False, told)
    assert "ntp" in found.fix


def test_the_port_is_free_until_somebody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        found = doctor.port("127.0.0.1", number)
        assert not found.passed
        assert "--port 0" in found.fix
    assert doctor.port("127.0.0.1", number).passed


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_somebody_else_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert not doctor.data_folder(tmp_path / "shoal").passed


def test_a_data_folder_that_is_a_file_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert not doctor.data_folder(tmp_path / "file" / "shoal").passed
    assert doctor.data_folder(tmp_path / "new" / "shoal").passed
