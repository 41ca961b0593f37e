"""The commands and their names. What each one does is in the file of that name."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from .. import __version__
from . import demo, doctor, id, invite, leave, map, peers, ps, run_model, show, sim, status, up
from .failure import Command, last_resort

app = typer.Typer(
    name="shoal",
    help="Many small machines, one big model: a peer-to-peer mesh that serves language models.",
    epilog="Try it: shoal demo 'def fibonacci(n):'   Every setting: flag, SHOAL_* variable, file.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for name, command in (
    ("up", up.up),
    ("leave", leave.leave),
    ("demo", demo.demo),
    ("run", run_model.run_model),
    ("invite", invite.invite),
    ("show", show.show),
    ("ps", ps.ps),
    ("peers", peers.peers),
    ("map", map.map_layers),
    ("status", status.status),
    ("doctor", doctor.doctor),
    ("sim", sim.sim),
    ("id", id.show_id),
):
    app.command(name, cls=Command)(command)


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"shoal {__version__}")
        raise typer.Exit


@app.callback()
def shoal(
    version: Annotated[
        bool,
        typer.Option("--version", callback=show_version, is_eager=True, help="Show it, leave."),
    ] = False,
) -> None:
    """Many small machines, one big model: a mesh of nodes that serves open language models."""


def main() -> None:
    """Run the command line; whatever nobody foresaw ends in `last_resort`."""
    sys.excepthook = last_resort
    typer.main.get_command(app)(prog_name="shoal")
