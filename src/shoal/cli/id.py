"""`shoal id`: who this machine is in any mesh."""

from __future__ import annotations

from .options import AsJson
from .output import data, json_line


def show_id(as_json: AsJson = False) -> None:
    """Print this machine's node id and name; made on first use, no node needs to run."""
    from ..config import load_settings
    from ..identity import load_or_create

    identity = load_or_create(load_settings().folders.identity_file)
    if as_json:
        json_line({"node": identity.node, "name": identity.name})
    else:
        data(f"{identity.node}    {identity.name}")
