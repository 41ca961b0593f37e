"""What every benchmark here has in common: options, table, JSON, aims.

A script stands alone (``python bench/NAME.py``), ends within a minute with ``--quick``, and
measures its peer in the same run, interleaved. An aim is a ratio or a count, never an absolute time
of this machine.

    bench = Bench("hop", __doc__)
    for sample in range(300 if bench.quick else 3000): ...
    bench.row(what="tls, 16 KiB", p50_us=141.2, p99_us=260.0)
    bench.absent("uvloop", "not installed")
    bench.aim("tls / bare asyncio TLS, 16 KiB", "<= 1.5", got=1.2, holds=1.2 <= 1.5)
    bench.finish()
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Bench:
    """Reads the options at once; `parser` is given by scripts that have options of their own."""

    def __init__(
        self, name: str, doc: str | None, *, parser: argparse.ArgumentParser | None = None
    ) -> None:
        parser = parser or argparse.ArgumentParser()
        parser.description = (doc or name).partition("\n\n")[0]
        parser.add_argument("--quick", action="store_true", help="fewer repeats, within 60 s")
        parser.add_argument("--json", type=Path, metavar="PATH", help="write the results there")
        self.options = parser.parse_args()
        self.name = name
        self.quick: bool = self.options.quick
        self.rows: list[Row] = []
        self.aims: list[Row] = []

    def row(self, *, what: str, **values: Any) -> None:
        """One measured line; units belong into the names, as in ``p50_us=``."""
        self.rows.append({"what": what, **values})

    def absent(self, what: str, why: str) -> None:
        """A peer that could not be measured is reported, never counted as beaten."""
        self.rows.append({"what": what, "absent": why})

    def aim(self, name: str, aim: str, *, got: float, holds: bool) -> None:
        """What we want to hold on any machine, and what came out here."""
        self.aims.append({"name": name, "aim": aim, "got": round(got, 4), "holds": bool(holds)})

    def finish(self) -> None:
        """Print the table and the aims; write the JSON when asked for."""
        print(f"\n{self.name} at {commit()} on {describe(machine())}\n")
        print(table(self.rows))
        for aim in self.aims:
            verdict = "holds" if aim["holds"] else "MISSED"
            print(f"aim {verdict}: {aim['name']}: {aim['got']} (aim {aim['aim']})")
        if self.options.json is not None:
            self.options.json.write_text(json.dumps(self.report(), indent=1) + "\n")

    def report(self) -> Row:
        return {
            "name": self.name,
            "commit": commit(),
            "machine": machine(),
            "rows": self.rows,
            "aims": self.aims,
        }


def percentile(samples: Sequence[float], percent: float) -> float:
    """The smallest sample that at least `percent` % of all do not exceed."""
    ordered = sorted(samples)
    place = -(-len(ordered) * percent // 100)  # rounded up
    return ordered[max(0, min(len(ordered), int(place)) - 1)]


def commit() -> str:
    """Short hash of the source, with + when the working tree differs; "unknown" without git."""
    here = Path(__file__).parent
    try:
        short = _git(here, "rev-parse", "--short", "HEAD")
        return short + ("+" if _git(here, "status", "--porcelain", "--", "../src", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine() -> Row:
    """What the figures depend on."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
    }


def describe(machine: Row) -> str:
    load = f", load {machine['load_before']}" if machine["load_before"] is not None else ""
    return f"{machine['cpu']}, {machine['cores']} cores{load}, Python {machine['python']}"


def table(rows: Sequence[Row]) -> str:
    """Columns in the order of their first appearance; numbers to the right."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns] + [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], ""])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()
