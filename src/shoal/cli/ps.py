"""`shoal ps`: what this node serves now."""

from __future__ import annotations

from .client import connect
from .options import Api, ApiKey, AsJson
from .output import data, json_line, note, table
from .reports import OwnStage

HEADERS = ("NAME", "ID", "LAYERS", "STATE", "COMPUTE", "SESSIONS", "KV USED", "KV FREE")


def ps(api: Api = None, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """List the slices that the node on this machine serves."""
    stages = connect(api, api_key).node().stages
    if as_json:
        json_line(stages)
        return
    data(table(HEADERS, [row(stage) for stage in stages]))
    if not stages:
        note("this node serves no layers; `shoal up --model MODEL` does")


def row(stage: OwnStage) -> tuple[str, ...]:
    used, free = f"{stage.pages_used:.0%}", f"{stage.free_tokens} of {stage.total_tokens} tokens"
    sessions = str(stage.sessions)
    name, model = stage.model_name, stage.model[:12]
    return name, model, stage.layers, stage.state, stage.compute, sessions, used, free
