"""`shoal sim FILE.toml`: a whole mesh in one process, in virtual time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from ..errors import BadConfig
from ..units import readable_bytes

if TYPE_CHECKING:
    from ..sim.report import Percentiles, Report, Sample

SAY_S = 2.0  # of real time, between two words about a long run


def sim(
    file: Annotated[Path, typer.Argument(help="The scenario, a TOML file: see docs/sim.md.")],
    seed: Annotated[int | None, typer.Option(help="In place of the scenario's.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw them: .png or .svg.")] = None,
    log: Annotated[Path | None, typer.Option(help="Write each event, as JSON lines.")] = None,
) -> None:
    """Simulate a mesh: the real code of placement, routing, sessions, links and bus, with modelled
    machines and wires, faster than time passes.
    """
    from ..sim.running import simulate
    from ..sim.scenario import read_scenario

    scenario = read_scenario(file)
    for path in filter(None, (json_path, plot, log)):
        _need_folder(path)
    if plot is not None:
        _need_matplotlib(plot)
    console, began = Console(), time.monotonic()
    words = Console(stderr=True)
    with _EventLog(log) as events:
        report = simulate(
            scenario,
            seed=seed,
            progress=_Progress(words, scenario.duration_s),
            listener=events.write if log is not None else None,
            folder=file.parent,
        )
    console.print(_table(report, scenario.duration_s, time.monotonic() - began))
    _print_course(console, report)
    if report.endings and not report.endings.get("whole"):
        words.print(
            "not one request was answered: have the nodes memory for all layers of the model? "
            "--log FILE says what each came to hold"
        )
    if json_path is not None:
        json_path.write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    if plot is not None:
        _draw(report, plot)


class _Progress:
    """Says now and then how far a run is."""

    def __init__(self, console: Console, duration_s: float) -> None:
        self._console, self._duration_s, self._said = console, duration_s, time.monotonic()

    def __call__(self, sample: Sample) -> None:
        if time.monotonic() - self._said >= SAY_S:
            self._said = time.monotonic()
            self._console.print(
                f"{sample.at_s:.0f} of {self._duration_s:.0f} s: {sample.nodes} nodes, "
                f"{sample.running} requests, {sample.tokens_per_s:.0f} tokens/s",
                style="dim",
            )


class _EventLog:
    """One JSON array a line: seconds, name of the node, event."""

    def __init__(self, path: Path | None) -> None:
        self._path, self._encoder = path, msgspec.json.Encoder()

    def __enter__(self) -> _EventLog:
        self._file = self._path.open("wb") if self._path is not None else None
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, at_s: float, name: str, what: object) -> None:
        if self._file is not None:
            self._file.write(self._encoder.encode((round(at_s, 6), name, what)) + b"\n")


def _table(report: Report, duration_s: float, took_s: float) -> Table:
    table = Table(title=report.name or "simulated mesh", show_header=False)
    rows = [
        ("virtual time", f"{duration_s:.0f} s, in {took_s:.1f} s"),
        ("nodes at the end", str(report.nodes)),
        ("measured", f"{report.measured_s:.0f} s of it, after the warm-up"),
        ("answers", f"{report.output_tokens_per_s:.1f} tokens/s on average, all clients together"),
        ("prompts", f"{report.prompt_tokens_per_s:.1f} tokens/s"),
        ("first token", _percentiles(report.first_token)),
        ("between tokens", _percentiles(report.between_tokens)),
        ("requests", ", ".join(f"{n} {how}" for how, n in report.endings.items()) or "none"),
        ("wrong texts", str(report.wrong_texts)),
        ("routes taken", f"{report.routes}: those that took the place of broken ones included"),
        ("moves", f"{report.moves}; {readable_bytes(report.loaded_bytes)} of weights loaded"),
        ("between nodes", readable_bytes(report.link_bytes)),
        (
            "relays",
            f"{_counts(report.relay_posted)} in, {_counts(report.relay_delivered)} out",
        ),
        ("seed, digest", f"{report.seed}, {report.digest[:16]}"),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def _percentiles(of: Percentiles) -> str:
    if not of.count:
        return "-"
    if not of.count:
        return "none"
    return f"p50 {of.p50:.3f} s · p95 {of.p95:.3f} s · p99 {of.p99:.3f} s · of {of.count}"


def _counts(by_kind: dict[str, int]) -> str:
    return " + ".join(f"{count} {kind}s" for kind, count in sorted(by_kind.items())) or "nothing"


def _print_course(console: Console, report: Report) -> None:
    from ..sim.report import sparkline

    for name, values in _courses(report).items():
        console.print(f"{name:>12} {sparkline(values)} up to {max(values, default=0):.0f}")


def _courses(report: Report) -> dict[str, list[float]]:
    return {
        "tokens/s": [sample.tokens_per_s for sample in report.samples],
        "requests": [float(sample.running) for sample in report.samples],
        "nodes": [float(sample.nodes) for sample in report.samples],
    }


def _need_folder(path: Path) -> None:
    """Before the run, not after it."""
    if not path.parent.is_dir():
        raise BadConfig(f"there is no folder {path.parent} for {path.name}", hint="mkdir it")
    if path.is_dir():
        raise BadConfig(f"{path} is a folder", hint="name a file")


def _need_matplotlib(plot: Path) -> None:
    if plot.suffix not in (".png", ".svg", ".pdf"):
        raise BadConfig(f"{plot.name} is no picture that --plot draws", hint="FILE.png or FILE.svg")
    try:
        import matplotlib  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
    except ImportError:
        raise BadConfig("--plot needs matplotlib", hint='pip install "shoal[sim]"') from None


def _draw(report: Report, path: Path) -> None:
    """Each course over time, one below the other."""
    from matplotlib.figure import Figure  # type: ignore[import-not-found,unused-ignore]

    figure = Figure(figsize=(9, 6), layout="constrained")
    courses = _courses(report)
    times = [sample.at_s for sample in report.samples]
    for axes, (name, values) in zip(
        figure.subplots(len(courses), sharex=True), courses.items(), strict=True
    ):
        axes.plot(times, values)
        axes.set_ylabel(name)
        axes.set_ylim(bottom=0)
    axes.set_xlabel("virtual seconds")
    figure.suptitle(report.name)
    figure.savefig(path)
