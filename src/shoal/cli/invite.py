"""`shoal invite`: the ticket that lets another machine join."""

from __future__ import annotations

from ..errors import LocalError
from .client import connect
from .options import Api, ApiKey, AsJson
from .output import data, json_line, note


def invite(api: Api = None, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Print a ticket for this node's mesh. Whoever has that of a private mesh is a member of it."""
    report = connect(api, api_key).node(ticket=True)
    if not report.ticket:
        raise LocalError(
            "the node gave no ticket: it knows no relay that others could use",
            hint="shoal up --relay wss://RELAY, or shoal status to see its relays",
        )
    if as_json:
        json_line({"ticket": report.ticket})
        return
    data(report.ticket)
    note("on the other machine: shoal up --join TICKET")
