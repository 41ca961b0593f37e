"""The `shoal` command: one file a command, data on stdout, progress and hints on stderr.

Knows: flags, tables, exit codes, how to find the node of this machine (`client.py`) and how to
start processes (`children.py`).
Does not know: how a node works; whatever is shown comes from its HTTP API or from `shoal.node`.
Start reading at `app.py`. Heavy imports live inside the commands, so that `--help` stays quick.
"""

from __future__ import annotations

import sys

__all__ = ["run"]

_INTERRUPTED = 130


def run() -> None:
    """Run the command line of this process; leaves by SystemExit with the command's exit code."""
    try:
        from .app import main

        main()
    except KeyboardInterrupt:  # before the command took over its signals
        sys.exit(_INTERRUPTED)
