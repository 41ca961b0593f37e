"""Scenarios: what is read from a file, and what comes of it."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from shoal.cli.app import app
from shoal.errors import BadConfig
from shoal.sim.report import Percentiles, Report, sparkline
from shoal.sim.running import draw, read_trace, simulate
from shoal.sim.scenario import Spread, read_scenario, size

SMALL = """
name = "small"
seed = 3
duration_s = 60
warm_up_s = 20
[[models]]
name = "toy"
layers = 12
layer_bytes = "1 MB"
kv_bytes = 100
activation_bytes = 4096
[[nodes]]
name = "pc"
count = 4
memory = "6 MB"
seconds = { step_s = 0.001, layer_s = 0.002, token_s = 0.0001 }
load_bytes_per_s = "10 MB"
[[links]]
delay_s = 0.005
[[requests]]
model = "toy"
rate_per_s = 0.5
prompt_tokens = { mean = 30 }
output_tokens = { mean = 20 }
from_s = 20
"""

CHURN = """
[[churn]]
kills_per_h = 200
joins_per_h = 200
stops_per_h = 100
leaves_per_h = 60
from_s = 20
[[partitions]]
at_s = 35
for_s = 5
regions = [""]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "scenario.toml"
    path.write_text(text)
    return path


def report_of(folder: Path, text: str) -> Report:
    return simulate(read_scenario(write(folder, text)), folder=folder)


def test_a_scenario_runs_to_a_report(tmp_path: Path) -> None:
    report = report_of(tmp_path, SMALL)
    assert list(report.endings) == ["whole"]
    assert report.wrong_texts == 0
    assert report.nodes == 4
    assert 0.02 < report.between_tokens.p50 < 0.1
    assert report.output_tokens_per_s == pytest.approx(10, rel=0.5)
    assert report.link_bytes > 4096 * 30 * report.endings["whole"]


def test_the_same_file_gives_the_same_run_and_another_seed_another(tmp_path: Path) -> None:
    scenario = read_scenario(write(tmp_path, SMALL + CHURN))
    first, again = simulate(scenario), simulate(scenario)
    assert msgspec.json.encode(first) == msgspec.json.encode(again)
    assert simulate(scenario, seed=4).digest != first.digest


def test_whatever_happens_each_request_ends_and_no_text_is_wrong(tmp_path: Path) -> None:
    report = report_of(tmp_path, SMALL + CHURN)
    assert report.wrong_texts == 0
    assert "running" not in report.endings


@pytest.mark.parametrize(
    ("found", "instead", "told"),
    [
        ('name = "pc"', 'name = "pc"\ncolour = 1', "colour"),
        ('model = "toy"', 'model = "toi"', "there is no model 'toi', only 'toy'"),
        ("duration_s = 60", "duration_s = -1", "duration_s"),
        ("warm_up_s = 20", "warm_up_s = 300", "warm_up_s leaves nothing"),
        ("layers = 12", 'layers = "x"', "models[0].layers"),
        ("seed = 3", "seed = ", "scenario.toml"),
    ],
)
def test_a_mistake_is_told_with_its_place(
    found: str, instead: str, told: str, tmp_path: Path
) -> None:
    with pytest.raises(BadConfig, match=r"scenario\.toml") as caught:
        read_scenario(write(tmp_path, SMALL.replace(found, instead, 1)))
    assert told in str(caught.value)


def test_sizes_are_numbers_or_text() -> None:
    assert [size(1500), size("1.5 kB"), size("24 GB"), size("1 MiB")] == [
        1500,
        1500,
        24 * 10**9,
        1 << 20,
    ]
    with pytest.raises(BadConfig):
        size("much")


def test_a_trace_is_asked_for_line_by_line(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text("at_s,prompt_tokens,output_tokens\n3,20,5\n1,10,7\n")
    asking = 'arrivals = "trace"\ntrace = "trace.csv"'
    report = report_of(tmp_path, SMALL.replace("rate_per_s = 0.5", asking))
    assert report.endings == {"whole": 2}
    (tmp_path / "trace.csv").write_text("when\n1\n")
    with pytest.raises(BadConfig, match="trace"):
        list(read_trace(tmp_path / "trace.csv"))


def test_numbers_of_tokens_have_the_mean_and_the_limit_asked_for() -> None:
    chance, wide = random.Random(1), Spread(mean=200, spread=1.0, most=1000)
    drawn = [draw(wide, chance) for _ in range(5000)]
    assert max(drawn) == 1000
    assert sum(drawn) / len(drawn) == pytest.approx(195, rel=0.05)
    assert draw(Spread(mean=7), chance) == 7


def test_percentiles_and_sparklines_of_nothing_are_nothing() -> None:
    assert Percentiles.of([]) == Percentiles()
    assert sparkline([]) == ""
    assert sparkline([0, 1, 2, 4]) == " ▂▄█"


def test_the_command_prints_a_table_and_writes_figures_and_events(tmp_path: Path) -> None:
    path, figures, events = write(tmp_path, SMALL), tmp_path / "out.json", tmp_path / "log.jsonl"
    command = ["sim", str(path), "--json", str(figures), "--log", str(events)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "tokens/s" in done.output
    report = msgspec.json.decode(figures.read_bytes(), type=Report)
    assert report.endings["whole"] > 8
    assert b"RouteTaken" in events.read_bytes()


@pytest.mark.parametrize(
    ("option", "to", "why"),
    [
        ("--json", "none/out.json", "there is no folder"),
        ("--log", "none/log.jsonl", "there is no folder"),
        ("--json", ".", "is a folder"),
        ("--plot", "out.xyz", "is no picture"),
    ],
)
def test_what_cannot_be_written_is_said_before_the_run(
    tmp_path: Path, option: str, to: str, why: str
) -> None:
    done = CliRunner().invoke(app, ["sim", str(write(tmp_path, SMALL)), option, str(tmp_path / to)])
    assert isinstance(done.exception, BadConfig) or why in done.output
    assert "virtual time" not in done.output


def test_a_mesh_that_answers_nothing_says_what_to_look_at(tmp_path: Path) -> None:
    small = SMALL.replace('layer_bytes = "1 MB"', 'layer_bytes = "100 GB"')
    done = CliRunner().invoke(app, ["sim", str(write(tmp_path, small))])
    assert done.exit_code == 0
    assert "have the nodes memory for all layers" in " ".join(done.output.split())
