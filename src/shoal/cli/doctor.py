"""`shoal doctor`: what a node needs on this machine, each with ✓ or ✗ and the fix."""

from __future__ import annotations

import os
import socket
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import typer

from ..errors import NotRunning, ShoalError
from ..units import readable_bytes
from .client import NodeClient, connect
from .engine_check import install_line, installed_versions, missing_modules
from .failure import DEBUG_VARIABLE
from .options import Api, ApiKey, AsJson
from .output import check, json_line, note

if TYPE_CHECKING:
    from ..config import Settings

MIN_PYTHON = (3, 11)
MIN_FREE_BYTES = 1_000_000_000


class Finding(msgspec.Struct, frozen=True):
    """One check; `fix` is what to do when it did not pass."""

    check: str
    passed: bool
    found: str
    fix: str = ""


def doctor(api: Api = None, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Check what a node needs on this machine, and say how to mend what is missing."""
    from ..config import load_settings

    settings = load_settings()
    findings = [
        python_version(),
        engine(),
        data_folder(settings.folders.data),
        identity_file(settings.folders.identity_file),
        memory(),
        variables(),
        *running_node(connect(api, api_key), settings),
    ]
    if as_json:
        json_line(findings)
    else:
        show(findings)
    if not all(finding.passed for finding in findings):
        raise typer.Exit(1)


def show(findings: list[Finding]) -> None:
    for one in findings:
        check(one.passed, one.check, one.found, to_stdout=True)
        if not one.passed and one.fix:
            note(f"  try: {one.fix}")


def python_version() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    wanted = ".".join(map(str, MIN_PYTHON))
    return Finding(
        "python", sys.version_info >= MIN_PYTHON, found, f"install Python {wanted} or newer"
    )


def engine() -> Finding:
    """Looks for the packages without importing them: torch alone takes seconds."""
    if missing := missing_modules():
        return Finding("engine", False, f"not installed: {', '.join(missing)}", install_line())
    return Finding("engine", True, installed_versions())


def data_folder(folder: Path) -> Finding:
    """The folder, or the nearest one above it that exists, has to be ours to write."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    usable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    fix = f"chown or chmod {existing}, or set SHOAL_HOME to a folder of yours"
    return Finding("data", usable, str(folder) if usable else f"cannot write in {existing}", fix)


def identity_file(path: Path) -> Finding:
    if not path.exists():
        return Finding("identity", True, "none yet, made by the first `shoal up`")
    private = os.name != "posix" or not path.stat().st_mode & 0o077
    found = str(path) if private else f"{path} can be read by other users"
    return Finding("identity", private, found, f"chmod 600 {path}")


def memory() -> Finding:
    import psutil

    free = psutil.virtual_memory().available
    found = f"{readable_bytes(free)} free"
    return Finding(
        "memory", free >= MIN_FREE_BYTES, found, "close programs, or give a small --memory"
    )


def variables() -> Finding:
    from ..config import unknown_variables

    unknown = [name for name in unknown_variables(os.environ) if name != DEBUG_VARIABLE]
    found = f"ignored, unknown: {', '.join(unknown)}" if unknown else "no unknown SHOAL_* variable"
    return Finding("settings", not unknown, found, "unset it, or correct its name: shoal up --help")


def running_node(client: NodeClient, settings: Settings) -> list[Finding]:
    """The running node and its relays; without one, whether its port is free."""
    try:
        report = client.node()
    except NotRunning:
        return [port(settings.api_host, settings.api_port)]
    except ShoalError as error:
        return [Finding("node", False, error.message, error.hint)]
    return [
        Finding("node", True, f"{report.name} answers at {client.api}"),
        clock(report.clock_behind_s),
        *[
            Finding(
                "relay",
                r.connected,
                f"{r.url} {r.error or ''}".strip(),
                "check the network, or --relay URL",
            )
            for r in report.relays
        ],
    ]


def clock(behind_s: float) -> Finding:
    """By the mesh's time; who is less than half a minute off it is not told."""
    way = "behind" if behind_s > 0 else "ahead of"
    found = f"{abs(behind_s):.0f} s {way} the mesh's" if behind_s else "as the mesh's"
    fix = "let the system set it (timedatectl set-ntp true); until then the mesh's is used"
    return Finding("clock", not behind_s, found, fix)


def port(host: str, number: int) -> Finding:
    with closing(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, number))
        except OSError as error:
            found = f"{host}:{number} cannot be used: {error.strerror}"
            return Finding(
                "port", False, found, "end the program that uses it, or shoal up --port 0"
            )
    return Finding("port", True, f"{host}:{number} is free; no node runs")
