"""`shoal demo`: a whole mesh on this machine, one prompt, one answer.

This process starts node processes and talks to the first over HTTP; it never loads a model.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from time import monotonic, perf_counter, sleep
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from ..errors import InvalidRequest, LocalError, NotRunning
from ..units import Slice
from .children import Children, sandbox, shoal_command
from .client import NodeClient
from .completions import Tally, stream_answer
from .map import rows
from .options import AsJson, Draft, Dtype, Quant
from .output import json_line, note, stream
from .reports import MeshModel, MeshNode, MeshStage

if TYPE_CHECKING:
    from ..models.checkpoint import Checkpoint

POLL_S = 0.2
READY_TIMEOUT_S = 600.0
Found = TypeVar("Found")
Holders = list[tuple[MeshNode, MeshStage]]


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoPlan:
    """What the node processes are told: the same for all, but for the layers and the relay."""

    model: str
    ticket: str
    relay_port: int
    threads: int
    dtype: str | None = None
    quant: str | None = None
    draft: str | None = None

    def arguments(self, layers: Slice, *, first: bool) -> list[str]:
        """Of `shoal up`. The first node runs the relay that the ticket names."""
        told = ["up", "--json", "--exit-with-parent", "--no-lan", "--port", "0"]
        told += ["--listen", "127.0.0.1:0", "--join", self.ticket, "--threads", str(self.threads)]
        told += ["--model", self.model, "--layers", str(layers)]
        told += ["--relay-port", str(self.relay_port)] if first else []
        told += ["--dtype", self.dtype] if self.dtype else []
        told += ["--quant", self.quant] if self.quant else []
        return told + (["--draft", self.draft] if self.draft else [])


def demo(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")] = "def fibonacci(n):",
    model: Annotated[
        str, typer.Option(metavar="DIR|ID", help="A checkpoint: folder or Hugging Face id.")
    ] = "shoal-tiny",
    nodes: Annotated[int, typer.Option(min=1, max=64, help="Node processes to start.")] = 3,
    max_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 = always the likeliest token.")
    ] = 0.0,
    dtype: Dtype = None,
    quant: Quant = None,
    draft: Draft = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the API up until Ctrl-C.")] = False,
    as_json: AsJson = False,
) -> None:
    """Start a mesh of node processes on this machine and let it answer PROMPT."""
    started = perf_counter()
    checkpoint, slices = opened(model, nodes)
    relay_port = free_port()
    plan = DemoPlan(
        model=model,
        ticket=private_ticket(relay_port),
        relay_port=relay_port,
        threads=max(1, (os.cpu_count() or 1) // nodes),
        dtype=dtype,
        quant=quant,
        draft=draft,
    )
    with sandbox() as children:
        client = start(plan, slices, children)
        found, holders = wait_for_model(client, checkpoint, children)
        startup_s = perf_counter() - started
        note("\n".join(rows(found, holders)) + "\n")
        request = {"prompt": prompt, "max_tokens": max_tokens, "temperature": temperature}
        tally = answer(client, {"model": found.name, **request}, quiet=as_json)
        if as_json:
            json_line(summary(found, holders, prompt, tally, startup_s))
        note(figures(tally, startup_s))
        if keep:
            stay(client, found.name, children)


def opened(model: str, nodes: int) -> tuple[Checkpoint, list[Slice]]:
    """The checkpoint and one slice a node. Raises InvalidRequest for more nodes than layers."""
    from ..models.checkpoint import open_checkpoint
    from ..placement import split

    checkpoint = open_checkpoint(model)
    if nodes > checkpoint.layers:
        raise InvalidRequest(
            f"{checkpoint.name} has {checkpoint.layers} layers, too few for {nodes} nodes",
            hint=f"--nodes {checkpoint.layers} or fewer",
            param="nodes",
        )
    last = Slice(checkpoint.layers - 1, checkpoint.layers)
    head_bytes = checkpoint.slice_bytes(last) - checkpoint.layer_bytes[-1]
    return checkpoint, split(checkpoint.layer_bytes, nodes, head_bytes=head_bytes)


def start(plan: DemoPlan, slices: list[Slice], children: Children) -> NodeClient:
    """Start all nodes at once; back as soon as the first one's API is up."""
    gateway, *others = [
        children.start(f"node-{i + 1}", shoal_command(*plan.arguments(layers, first=i == 0)))
        for i, layers in enumerate(slices)
    ]
    note(
        f"{1 + len(others)} nodes start, with layers {', '.join(map(str, slices))} of {plan.model}"
    )
    return NodeClient(wait_until(lambda: gateway.ready, children, "the first node").api)


def wait_for_model(
    client: NodeClient, checkpoint: Checkpoint, children: Children
) -> tuple[MeshModel, Holders]:
    """The model and its holders once the mesh covers all its layers."""

    def covered() -> tuple[MeshModel, Holders] | None:
        try:
            mesh = client.mesh()
        except NotRunning:
            return None
        found = mesh.model(checkpoint.model_id)
        return (found, mesh.holders(found.model)) if found and found.ready else None

    return wait_until(covered, children, f"every layer of {checkpoint.name}")


def wait_until(probe: Callable[[], Found | None], children: Children, what: str) -> Found:
    """Ask until there is an answer. Raises LocalError when a child dies or time runs out."""
    deadline = monotonic() + READY_TIMEOUT_S
    while (found := probe()) is None:
        children.check()
        if monotonic() > deadline:
            raise LocalError(
                f"waited {READY_TIMEOUT_S:.0f} s for {what}",
                hint="SHOAL_DEBUG=1, or a smaller model",
            )
        sleep(POLL_S)
    return found


def answer(client: NodeClient, request: dict[str, Any], *, quiet: bool) -> Tally:
    """Stream the continuation to stdout behind its prompt."""
    show: Callable[[str], None] = (lambda text: None) if quiet else stream
    tally = Tally()
    show(request["prompt"])
    for piece in stream_answer(client, "/v1/completions", request):
        tally.add(piece)
        show(piece.text)
    show("\n")
    return tally


def summary(
    model: MeshModel, holders: Holders, prompt: str, tally: Tally, startup_s: float
) -> dict[str, Any]:
    """The object of --json. `text` is what the model added to the prompt."""
    return {
        "model": model.name,
        "prompt": prompt,
        "text": tally.text,
        "tokens": tally.tokens,
        "finish_reason": tally.finish,
        "stages": [{"node": n.node, "name": n.name, "layers": s.layers} for n, s in holders],
        "tokens_per_second": round(tally.tokens_per_second, 3),
        "ttft_s": round(tally.ttft_s, 4),
        "startup_s": round(startup_s, 3),
    }


def figures(tally: Tally, startup_s: float) -> str:
    return (
        f"\n{tally.tokens} tokens · {tally.tokens_per_second:.1f} tokens/s"
        f" · first after {tally.ttft_s:.2f} s · mesh up in {startup_s:.1f} s"
    )


def stay(client: NodeClient, model: str, children: Children) -> None:
    """Keep the mesh up until a signal, or until a node dies."""
    note(f"\nAPI  {client.api}/v1      Ctrl-C ends it. Try:")
    body = f'{{"model": "{model}", "prompt": "import os", "max_tokens": 32}}'
    note(f"  curl {client.api}/v1/completions -H 'Content-Type: application/json' -d '{body}'")
    while True:
        children.check()
        sleep(POLL_S)


def private_ticket(relay_port: int) -> str:
    """An invitation to a mesh that nobody else can join, over a relay of our own."""
    from ..identity import Ticket

    relay = f"ws://127.0.0.1:{relay_port}"
    return Ticket(secret=secrets.token_bytes(32), relays=(relay,)).encode()


def free_port() -> int:
    """A TCP port that nobody used a moment ago."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
