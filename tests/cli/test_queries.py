"""ps, peers, map, status and invite against a server that answers as a node does."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from .conftest import Shoal
from .fake_node import AMBER, MODEL_ID, TICKET, FakeNode, stage

QUERIES = [["ps"], ["peers"], ["map", "shoal-tiny"], ["status"], ["invite"]]


def test_ps_lists_what_this_node_serves(shoal: Shoal) -> None:
    result = shoal("ps")
    header, row = result.stdout.splitlines()
    assert header.split("    ")[0] == "NAME"
    assert " ".join(row.split()) == (
        "shoal-tiny 0123456789ab 0:3 serving bf16 2 25% 6144 of 8192 tokens"
    )
    assert result.exit_code == 0


def test_ps_of_a_node_without_layers_says_how_to_serve_some(
    shoal: Shoal, fake_node: FakeNode
) -> None:
    fake_node.node["stages"] = []
    result = shoal("ps")
    assert result.stdout.startswith("NAME")
    assert "shoal up --model" in result.stderr


def test_peers_lists_the_nodes_and_marks_this_one(shoal: Shoal) -> None:
    lake, amber = shoal("peers").stdout.splitlines()[1:]
    assert "still-lake" in lake
    assert "shoal-tiny 3:8" in lake
    assert "8.0 GB" in lake
    assert "21 GB/s" in lake
    assert "about a minute ago" in lake
    assert "amber-fox (this one)" in amber


def test_map_draws_one_bar_a_node_in_the_order_of_layers(shoal: Shoal) -> None:
    head, amber, lake = shoal("map", "shoal-tiny").stdout.splitlines()
    assert "8 layers · healthy · weakest layer held by 1" in head
    assert amber.startswith("amber-fox")
    assert "█" * 12 + "·" * 20 in amber
    assert "·" * 12 + "█" * 20 in lake
    assert "0:3 · bf16" in amber


def test_map_says_how_quick_it_is_and_whom_the_mesh_cannot_do_without(
    shoal: Shoal, fake_node: FakeNode
) -> None:
    said = "weakest layer held by 1; about 14 tokens/s for one, at most 90 for all together"
    alone = [
        {"node": f"npub{n}", "name": f"oak-{n}", "gone": f"if oak-{n} leaves, layer {n} is gone"}
        for n in range(6)
    ]
    told = {"verdict": said, "first_token_s": 0.31, "needed": alone}
    fake_node.mesh["models"] = [{**fake_node.mesh["models"][0], **told}]
    head, _, _, empty, first, *losses = shoal("map", "shoal-tiny").stdout.splitlines()
    assert head.endswith(f"8 layers · healthy · {said}")
    assert (empty, first) == ("", "a short question is answered after about 0.31 s")
    assert losses[0] == "if oak-0 leaves, layer 0 is gone"
    assert losses[4:] == ["and so with 2 more nodes"]


def test_map_tells_why_there_is_no_route_though_every_layer_is_held(
    shoal: Shoal, fake_node: FakeNode
) -> None:
    why = "no route for shoal-tiny: its layers are held in different compute classes"
    broken = {**fake_node.mesh["models"][0], "ready": False, "verdict": why}
    fake_node.mesh["models"] = [broken]
    assert "incomplete · its layers are held in different" in shoal("map", "shoal-tiny").stdout


def test_map_knows_a_model_by_the_start_of_its_id(shoal: Shoal) -> None:
    assert shoal("map", MODEL_ID[:6]).exit_code == 0


def test_map_finds_a_model_by_any_name_that_a_node_calls_it(
    shoal: Shoal, fake_node: FakeNode
) -> None:
    fake_node.mesh["nodes"][0]["stages"] = [{**stage("3:8"), "model_name": "a_folder"}]
    assert shoal("map", "a_folder").stdout == shoal("map", "shoal-tiny").stdout


def test_peers_says_what_is_still_being_loaded(shoal: Shoal, fake_node: FakeNode) -> None:
    fake_node.mesh["nodes"][0]["stages"] = [stage("3:6", "joining")]
    assert "shoal-tiny 3:6 (joining)" in shoal("peers").stdout


def test_map_names_the_layers_that_nobody_holds(shoal: Shoal, fake_node: FakeNode) -> None:
    fake_node.mesh["nodes"][0]["stages"] = [stage("3:6", "joining")]
    broken = {**fake_node.mesh["models"][0], "ready": False, "weakest": 0, "missing": ["3:8"]}
    fake_node.mesh["models"] = [broken]
    text = shoal("map", "shoal-tiny").stdout
    assert "incomplete · nobody serves 3:8" in text
    assert "· joining" in text


def test_map_of_an_unknown_model_names_the_known_ones(shoal: Shoal) -> None:
    result = shoal("map", "qwen3-8b")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "error: nobody in this mesh holds layers of qwen3-8b" in result.stderr
    assert "try: one of shoal-tiny" in result.stderr


def test_status_shows_identity_mesh_relays_and_slices(shoal: Shoal) -> None:
    text = shoal("status").stdout
    for part in (
        "amber-fox",
        AMBER,
        "2 cores",
        "21 GB/s measured",
        "public · shoal",
        "still-lake",
        "75 s",
    ):
        assert part in text
    assert "✓ relay     ws://127.0.0.1:7447" in text
    assert "✗ relay     wss://gone.example · down, tried 4 times: refused" in text


def test_status_as_json_is_what_the_node_said(shoal: Shoal, fake_node: FakeNode) -> None:
    assert json.loads(shoal("status", "--json").stdout) == fake_node.node


def test_invite_prints_the_ticket_alone_on_stdout(shoal: Shoal) -> None:
    result = shoal("invite")
    assert result.stdout == TICKET + "\n"
    assert "shoal up --join" in result.stderr


def test_invite_without_a_relay_is_an_error_with_a_hint(shoal: Shoal, fake_node: FakeNode) -> None:
    fake_node.ticket = None
    result = shoal("invite")
    assert result.exit_code == 1
    assert "--relay" in result.stderr


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query[0])
def test_json_is_one_line_for_programs(shoal: Shoal, query: list[str]) -> None:
    result = shoal(*query, "--json")
    assert result.stdout.count("\n") == 1
    assert json.loads(result.stdout)
    assert result.stderr == ""


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query[0])
def test_without_a_node_the_exit_code_is_3_and_the_hint_is_shoal_up(
    shoal: Shoal, query: list[str]
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{unused.getsockname()[1]}"
        result = shoal(*query, "--api", nowhere, asks=False)
    assert result.exit_code == 3
    assert result.stdout == ""
    assert f"error: no node answers at {nowhere}" in result.stderr
    assert "  try: shoal up" in result.stderr


def test_the_node_is_found_by_the_note_it_left(shoal: Shoal, fake_node: FakeNode) -> None:
    note = runtime_file(shoal)
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps({"pid": 1, "api": fake_node.url}))
    assert "shoal-tiny" in shoal("ps", asks=False).stdout


def runtime_file(shoal: Shoal) -> Path:
    from shoal.config import load_settings

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_HOME", str(shoal.home))
        return load_settings().folders.runtime_file


def test_a_missing_api_key_is_exit_code_5(shoal: Shoal, fake_node: FakeNode) -> None:
    fake_node.api_key = "secret"
    result = shoal("ps")
    assert result.exit_code == 5
    assert "--api-key" in result.stderr
    assert shoal("ps", "--api-key", "secret").exit_code == 0


def test_errors_under_json_are_json_on_stderr(shoal: Shoal, fake_node: FakeNode) -> None:
    fake_node.ticket = None
    result = shoal("invite", "--json")
    error = json.loads(result.stderr)["error"]
    assert set(error) == {"message", "hint", "code"}
    assert result.stdout == ""


def test_something_that_is_no_node_is_told_apart(shoal: Shoal, fake_node: FakeNode) -> None:
    fake_node.node = {"node": 7}
    result = shoal("ps")
    assert result.exit_code == 1
    assert "no shoal node" in result.stderr
