"""`shoal peers`: the nodes of the mesh, as this node sees them."""

from __future__ import annotations

from ..units import readable_bytes
from .client import connect
from .options import Api, ApiKey, AsJson
from .output import age, data, json_line, table
from .reports import MeshNode, MeshStage

HEADERS = ("NAME", "NODE", "LAYERS", "MEMORY", "BANDWIDTH", "API", "SEEN")


def peers(api: Api = None, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """List the nodes of the mesh and what they hold."""
    nodes = connect(api, api_key).mesh().nodes
    if as_json:
        json_line(nodes)
    else:
        data(table(HEADERS, [row(node) for node in nodes]))


def row(node: MeshNode) -> tuple[str, ...]:
    held = ", ".join(map(stage, node.stages)) or "-"
    speed = f"{readable_bytes(node.memory_bytes_per_s)}/s" if node.memory_bytes_per_s else "-"
    memory, gateway = readable_bytes(node.memory_bytes), "yes" if node.gateway else "no"
    seen = "now" if node.self else age(node.age_s)
    return node.label, node.node[:12], held, memory, speed, gateway, seen


def stage(one: MeshStage) -> str:
    state = "" if one.state == "serving" else f" ({one.state})"
    return f"{one.model_name} {one.layers}{state}"
