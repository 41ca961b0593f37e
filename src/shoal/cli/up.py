"""`shoal up`: this machine becomes a node of a mesh, until Ctrl-C."""

from __future__ import annotations

import asyncio
import signal
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING, Annotated, Any

import anyio
import typer

from ..errors import InvalidRequest, ShoalError
from ..units import Slice
from .board import Board
from .ending import Ending, leave_with_parent
from .failure import Stopped
from .options import AsJson, Device, Draft, Dtype, Quant
from .output import json_line

if TYPE_CHECKING:
    from ..node import Node, NodeConfig


def up(
    join: Annotated[
        str | None, typer.Option(metavar="TICKET", help="Join the mesh of this invitation.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Found a private mesh: `shoal invite` lets others in.")
    ] = False,
    mesh: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the public mesh to join.")
    ] = None,
    relay: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="Nostr relay to meet at; may be given several times."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="M", help="Serve this: folder, Hugging Face id or GGUF file."),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(metavar="A:B", help="Serve just these layers of it.")
    ] = None,
    dtype: Dtype = None,
    quant: Quant = None,
    device: Device = None,
    draft: Draft = None,
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Let this server compute: vLLM, SGLang, llama.cpp or compatible."
        ),
    ] = None,
    backend_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="What that server calls the model.")
    ] = None,
    backend_slots: Annotated[
        int | None, typer.Option(min=0, help="Sessions it gets at a time; 0 = as many as it says.")
    ] = None,
    backend_key_file: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Its key, if it wants one (or SHOAL_BACKEND_KEY)."),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="60%|8GB", help="What the node may use at most.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=0, help="Of the engine; 0 = one a core.")
    ] = None,
    kv_tokens: Annotated[
        int | None, typer.Option(min=0, help="Room for so many tokens, all sessions together.")
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Where the API listens; beyond this machine it wants a key.")
    ] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Of the API; 0 = any.")] = None,
    listen: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where other nodes connect.")
    ] = None,
    no_lan: Annotated[
        bool, typer.Option("--no-lan", help="Neither search nor show on the local network.")
    ] = False,
    no_serve: Annotated[
        bool, typer.Option("--no-serve", help="Only an API and a relay: compute nothing here.")
    ] = False,
    api_key: Annotated[
        str | None, typer.Option(metavar="KEY", help="Asked of whoever uses the API.")
    ] = None,
    relay_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Run a relay here; 0 = any port.")
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="A line on stderr for each request and link.")
    ] = False,
    relay_keep: Annotated[
        bool, typer.Option("--relay-keep", help="That relay remembers between runs, on disk.")
    ] = False,
    as_json: AsJson = False,
    exit_with_parent: Annotated[bool, typer.Option("--exit-with-parent", hidden=True)] = False,
) -> None:
    """Make this machine a node: detect, join, serve, answer; until Ctrl-C."""
    if exit_with_parent:
        leave_with_parent()
    listen_host, listen_port = split_listen(listen)
    flags: dict[str, Any] = {
        "mesh": mesh,
        "relays": relay or None,
        "model": model,
        "layers": checked_layers(layers),
        "dtype": dtype,
        "quant": quant,
        "device": device,
        "draft": draft,
        "backend": backend,
        "backend_model": backend_model,
        "backend_slots": backend_slots,
        "backend_key_file": backend_key_file,
        "memory": memory,
        "threads": threads,
        "kv_tokens": kv_tokens,
        "api_host": host,
        "api_port": port,
        "api_key": api_key,
        "listen_host": listen_host,
        "listen_port": listen_port,
        "lan": False if no_lan else None,
        "relay_keep": relay_keep or None,
    }
    from ..config import load_settings
    from ..identity import Ticket
    from ..node import node_config

    config = node_config(
        load_settings(flags),
        ticket=Ticket.decode(join) if join else None,
        private=private,
        serve=not no_serve,
        relay_port=relay_port,
    )
    asyncio.run(serve(config, as_json=as_json, verbose=verbose))


async def serve(config: NodeConfig, *, as_json: bool, verbose: bool = False) -> None:
    """Be a node until a signal. SIGTERM ends a service and is no failure; Ctrl-C is told as 130."""
    from ..node import Node

    new = not config.folders.identity_file.exists()
    node = Node(config)
    board = Board(node)
    ending = Ending(board.hurry)
    async with AsyncExitStack() as stack:
        with ending.starting:
            await stack.enter_async_context(node)
        if not ending.signal:
            node.events.listen(board.show)
            if verbose:
                log_to_stderr(node)
            json_line(ready(node)) if as_json else board.introduce(new=new)
            await stay(node, ending, board)
    if ending.signal == signal.SIGINT:
        raise Stopped(ending.signal)


def log_to_stderr(node: Node) -> None:
    from ..telemetry import configure_logging, log_event

    configure_logging()
    node.events.listen(log_event)


async def stay(node: Node, ending: Ending, board: Board) -> None:
    """Until somebody ends us, or a part of the node fails."""

    async def tell_when_serving() -> None:
        with suppress(ShoalError):  # run_until raises it too
            await node.wait_serving()
            board.settled()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(tell_when_serving)
        try:
            await node.run_until(ending.asked)
        finally:
            board.end()
        board.leave()
        tasks.cancel_scope.cancel()


def ready(node: Node) -> dict[str, str | None]:
    """The object of --json: printed once the API listens, while the layers still load."""
    return {
        "node": node.identity.node,
        "name": node.name,
        "api": node.api_url,
        "ticket": node.ticket().encode(),
        "relay": node.relay_url,
    }


def checked_layers(layers: str | None) -> str | None:
    """Refused here already when it is no range: loading a model only to say so takes long."""
    return None if layers is None else str(Slice.parse(layers))


def split_listen(address: str | None) -> tuple[str | None, int | None]:
    """``127.0.0.1:0`` -> ("127.0.0.1", 0); (None, None) when it was not given."""
    if address is None:
        return None, None
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise InvalidRequest(
            f"{address!r} is no address to listen on",
            hint="write HOST:PORT, such as --listen 0.0.0.0:7472",
        )
    return host.removeprefix("[").removesuffix("]"), int(port)
