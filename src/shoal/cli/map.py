"""`shoal map MODEL`: which layers are held by whom, as bars."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import ModelNotFound
from .client import connect
from .options import Api, ApiKey, AsJson
from .output import bar, data, json_line, printable
from .reports import MeshModel, MeshNode, MeshReport, MeshStage

MAX_BAR = 36
MAX_NEEDED = 4  # nodes that are named one by one


def map_layers(
    model: Annotated[str, typer.Argument(help="Name or id of a model in the mesh.")],
    api: Api = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Draw which layers of MODEL are held by whom."""
    mesh = connect(api, api_key).mesh()
    found = mesh.model(model)
    if found is None:
        raise unknown(model, mesh)
    holders = mesh.holders(found.model)
    if as_json:
        held = [
            {"node": n.node, "name": n.name, "layers": s.layers, "state": s.state}
            for n, s in holders
        ]
        json_line({"model": found, "holders": held})
    else:
        data("\n".join([headline(found), *rows(found, holders), *advice(found)]))


def headline(model: MeshModel) -> str:
    """`8 layers · healthy · weakest layer held by 2; about 14 tokens/s for one, 90 for all`."""
    if model.ready:
        health = f"healthy · {model.verdict or f'weakest layer held by {model.weakest}'}"
    else:
        why = model.verdict.removeprefix(f"no route for {model.name}: ")
        health = f"incomplete · {why or 'nobody serves ' + (', '.join(model.missing) or 'it')}"
    return printable(f"{model.name}    {model.total_layers} layers · {health}")


def advice(model: MeshModel) -> list[str]:
    """How soon an answer begins, and whom the mesh cannot do without, below an empty line."""
    lines = []
    if model.ready and model.first_token_s:
        lines.append(f"a short question is answered after about {model.first_token_s:.2g} s")
    lines += [each.gone for each in model.needed[:MAX_NEEDED]]
    if len(model.needed) > MAX_NEEDED:
        lines.append(f"and so with {len(model.needed) - MAX_NEEDED} more nodes")
    return ["", *map(printable, lines)] if lines else []


def rows(model: MeshModel, holders: list[tuple[MeshNode, MeshStage]]) -> list[str]:
    """One line a node: its name, its bar, its layers."""
    names = [printable(node.label) for node, _ in holders]
    width = max(map(len, names), default=0)
    return [
        f"{name:<{width}}  {stage_bar(model, stage)}  {described(stage)}"
        for name, (_, stage) in zip(names, holders, strict=True)
    ]


def stage_bar(model: MeshModel, stage: MeshStage) -> str:
    layers, total = stage.slice, model.total_layers
    return bar(layers.start, layers.stop, total, max(MAX_BAR // total, 1) * min(total, MAX_BAR))


def described(stage: MeshStage) -> str:
    state = "" if stage.state == "serving" else f" · {stage.state}"
    return printable(f"{stage.layers} · {stage.compute}{state}")


def unknown(model: str, mesh: MeshReport) -> ModelNotFound:
    known = ", ".join(m.name for m in mesh.models)
    hint = f"one of {known}" if known else f"shoal up --model {model}"
    return ModelNotFound(f"nobody in this mesh holds layers of {model}", hint=hint)
