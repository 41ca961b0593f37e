"""What a node is told before it starts."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import Folders, Settings
from ..errors import BadConfig, InvalidRequest
from ..hardware import check_wish
from ..identity import Mesh, Ticket, load_or_create_secret
from ..units import QuantChoice, Slice
from .fronting import BackendConfig, backend_config
from .routing import Routing


@dataclass(kw_only=True, frozen=True, slots=True)
class NodeConfig:
    folders: Folders
    mesh: Mesh
    name: str = ""  # "" = the friendly name of the identity
    relays: tuple[str, ...] = ()
    relay_port: int | None = (
        None  # of the embedded relay; None = any, and only when there is no other relay
    )
    relay_keep: bool = False  # the embedded relay's events outlive it, on disk
    lan: bool = True
    listen_host: str = ""  # "" = every interface
    listen_port: int = 0
    api_host: str = "127.0.0.1"
    api_port: int = 7470
    api_key: str = ""
    serve: bool = True
    model: str = ""  # "" = whatever the mesh needs, else the built-in one
    layers: Slice | None = None  # pinned by hand
    memory: str = "60%"
    dtype: str | None = None
    quant: QuantChoice = "auto"
    device: str = "auto"  # or cpu, cuda, cuda:N, mps
    draft: str = "ngram"  # or "none", or a model
    backend: BackendConfig | None = None
    threads: int = 0
    kv_tokens: int = 0
    routing: Routing = "auto"
    leave_s: float = 30.0  # how long what runs here may take when we leave


def node_config(
    settings: Settings,
    *,
    ticket: Ticket | None = None,
    private: bool = False,
    serve: bool = True,
    relay_port: int | None = None,
) -> NodeConfig:
    """Join settings and what only `shoal up` can say. Raises BadConfig or InvalidRequest where they
    contradict.
    """
    if ticket is not None and private:
        raise InvalidRequest(
            "--join and --private contradict: the ticket says which mesh it is",
            hint="leave one of them out",
        )
    if settings.layers and not settings.model:
        raise BadConfig(
            "layers are pinned without a model", hint="say which: --model M --layers A:B"
        )
    if settings.quant not in ("auto", "none") and settings.dtype:
        raise BadConfig(
            f"{settings.quant} fixes the type of the hidden states: it is the checkpoint's own",
            hint="leave --dtype out, or use --quant none",
        )
    requantised = settings.quant in ("int8", "int4")
    if settings.model.endswith(".gguf") and (settings.dtype or requantised):
        raise BadConfig(
            "a GGUF file is computed in the types in which it is stored",
            hint="leave --dtype and --quant out, or take another file of the model",
        )
    if settings.model.endswith(".gguf") and settings.device not in ("auto", "cpu"):
        raise BadConfig(
            "a GGUF file is computed on the CPU",
            hint="leave --device out, or take the model's safetensors: --model NAME",
        )
    return NodeConfig(
        folders=settings.folders,
        mesh=_mesh(settings, ticket, private),
        name=settings.name,
        relays=(*settings.relays, *(ticket.relays if ticket else ())),
        relay_port=relay_port,
        relay_keep=settings.relay_keep,
        lan=settings.lan,
        listen_host="" if settings.listen_host == "0.0.0.0" else settings.listen_host,  # noqa: S104
        listen_port=settings.listen_port,
        api_host=settings.api_host,
        api_port=settings.api_port,
        api_key=settings.api_key,
        serve=serve,
        model=settings.model,
        layers=Slice.parse(settings.layers) if settings.layers else None,
        memory=settings.memory,
        dtype=settings.dtype or None,
        quant=settings.quant,
        device=check_wish(settings.device),
        draft=settings.draft,
        backend=backend_config(settings, serve=serve),
        threads=settings.threads,
        kv_tokens=settings.kv_tokens,
        routing=settings.routing,
        leave_s=settings.leave_s,
    )


def _mesh(settings: Settings, ticket: Ticket | None, private: bool) -> Mesh:
    if ticket is not None:
        return Mesh.of(ticket)
    if private:
        return Mesh.private(load_or_create_secret(settings.folders.mesh_file))
    return Mesh.public(settings.mesh)
