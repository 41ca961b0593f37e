"""`shoal status`: this node at a glance."""

from __future__ import annotations

from ..units import readable_bytes
from .client import connect, decoded
from .options import Api, ApiKey, AsJson
from .output import check, data, duration
from .reports import Hardware, NodeReport, OwnStage, Relay


def status(api: Api = None, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Show the node on this machine: identity, mesh, relays, slices, links."""
    client = connect(api, api_key)
    answer = client.ask("/v1/node")
    report = decoded(answer, NodeReport)
    if as_json:
        data(answer.decode())
        return
    for passed, label, text in [*lines(report), (True, "API", f"{client.api}/v1")]:
        check(passed, label, text, to_stdout=True)


def lines(report: NodeReport) -> list[tuple[bool, str, str]]:
    """(all is well, label, text) of each line."""
    up_for = f"shoal {report.version} · up for {duration(report.uptime_s)}"
    addresses = ", ".join(report.addresses) or "no direct address"
    links = ", ".join(peer.name for peer in report.links) or "none"
    return [
        (True, "node", f"{report.name} · {report.node}"),
        (not report.leaving, "running", up_for + (" · leaving" if report.leaving else "")),
        (True, "device", device(report.capability)),
        (True, "mesh", mesh_name(report)),
        *[relay_line(relay) for relay in report.relays],
        (bool(report.addresses), "address", addresses),
        *[
            (
                stage.state == "serving",
                "serving",
                f"{stage.model_name} {stage.layers} · {stage.state}{behind(stage)}",
            )
            for stage in report.stages
        ],
        (True, "links", links),
        *[(False, "faults", f"{count} by {node[:12]}") for node, count in report.faults.items()],
    ]


def behind(stage: OwnStage) -> str:
    return f" · by {stage.backend}" if stage.backend else ""


def mesh_name(report: NodeReport) -> str:
    """A private mesh's label says that it is private."""
    return report.mesh.label if report.mesh.private else f"public · {report.mesh.label}"


def device(hardware: Hardware) -> str:
    """`AMD EPYC · 2 cores · 8 GB · 21 GB/s measured`."""
    parts = [hardware.cpu, f"{hardware.cores} cores", readable_bytes(hardware.memory_bytes)]
    if hardware.memory_bytes_per_s:
        parts.append(f"{readable_bytes(hardware.memory_bytes_per_s)}/s measured")
    return " · ".join(filter(None, parts))


def relay_line(relay: Relay) -> tuple[bool, str, str]:
    if relay.connected:
        return True, "relay", relay.url
    return (
        False,
        "relay",
        f"{relay.url} · down, tried {relay.attempts} times: {relay.error or 'no answer'}",
    )
