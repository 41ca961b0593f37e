"""A scenario: what is simulated, read from a TOML file and checked before anything runs."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from ..errors import BadConfig
from ..units import Slice

Positive = Annotated[float, msgspec.Meta(gt=0)]
Amount = Annotated[float, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(ge=0, lt=1)]
Count = Annotated[int, msgspec.Meta(ge=1, le=100_000)]
Size = int | str  # bytes, or "24 GB"

_UNITS = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 1 << 10}
_UNITS |= {"mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}


class Model(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`layer_bytes` of each layer, `kv_bytes` of one token in one layer, `activation_bytes` of one
    token between two stages.
    """

    name: str
    layers: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    layer_bytes: Size
    kv_bytes: Size
    activation_bytes: Size
    embed_bytes: Size = 0
    head_bytes: Size = 0
    context_length: Annotated[int, msgspec.Meta(ge=1)] = 32_768


class NodeType(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`count` equal nodes. How long their steps take follows from the rates, or is said by
    `seconds` (see `hardware.Speed`); `texts` false: no text is made, which is faster to simulate.
    """

    name: str
    count: Annotated[int, msgspec.Meta(ge=0, le=100_000)] = 1
    region: str = ""
    memory: Size = 0
    memory_bytes_per_s: Size = 0
    int8_ops: Amount = 0.0
    seconds: dict[str, Amount] = {}
    load_bytes_per_s: Size = "1 GB"
    models: tuple[str, ...] | None = None  # that it may serve; None = all
    layers: str = ""  # pinned by hand, of the first of them
    gateway: bool = True
    join_within_s: Amount = 5.0  # after the beginning, at random
    clock_skew_s: Amount = 0.0  # its wall clock is up to so wrong, in either direction
    texts: bool = True


class Link(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The way between nodes of two regions, or within one. Without `between`: of all others."""

    between: tuple[str, ...] = ()
    delay_s: Amount = 0.0005  # one way
    jitter_s: Amount = 0.0
    loss: Share = 0.0
    bytes_per_s: Size = 0  # of each pair of nodes; 0 = unlimited


class Relays(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    count: Annotated[int, msgspec.Meta(ge=1, le=16)] = 1
    delay_s: Amount = 0.03
    jitter_s: Amount = 0.0
    loss: Share = 0.0
    outages: tuple[tuple[float, float], ...] = ()  # from, to; of all of them


class Churn(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Events an hour of the whole mesh, at random times. Who joins is of a type of `types`, in
    proportion to their counts; gateways that `requests` name are spared.
    """

    types: tuple[str, ...] = ()  # () = all
    joins_per_h: Amount = 0.0
    leaves_per_h: Amount = 0.0
    kills_per_h: Amount = 0.0
    stops_per_h: Amount = 0.0
    stop_s: Positive = 10.0
    from_s: Amount = 0.0
    until_s: Positive = 1e9


class Partition(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`regions` and all others do not reach each other for a while."""

    at_s: Amount
    for_s: Positive
    regions: tuple[str, ...]
    relays: bool = True  # are reached by both sides all the same


class Spread(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A number of tokens: log-normal with this mean, `spread` its deviation relative to it."""

    mean: Positive
    spread: Amount = 0.0
    most: Annotated[int, msgspec.Meta(ge=1)] = 1 << 20


class Requests(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who asks what. Bursty arrivals have gamma distributed gaps, `burstiness` times as irregular
    as Poisson's; `closed` keeps `at_once` requests going; a trace is a CSV file with the columns
    at_s, prompt_tokens, output_tokens.
    """

    model: str
    arrivals: Literal["poisson", "bursty", "closed", "trace"] = "poisson"
    rate_per_s: Amount = 0.0
    burstiness: Positive = 4.0
    at_once: Annotated[int, msgspec.Meta(ge=0, le=100_000)] = 0
    trace: str = ""
    prompt_tokens: Spread = Spread(mean=200.0, spread=1.0, most=4096)
    output_tokens: Spread = Spread(mean=100.0, spread=1.0, most=2048)
    gateways: tuple[str, ...] = ()  # types of nodes that are asked; () = all gateways
    patience_s: Positive = 600.0
    from_s: Amount = 0.0
    until_s: Positive = 1e9


class Scenario(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`warm_up_s` at the beginning do not count in the figures."""

    name: str = ""
    seed: int = 0
    duration_s: Positive
    warm_up_s: Amount = 0.0
    routing: Literal["auto", "latency", "throughput"] = "auto"
    models: Annotated[tuple[Model, ...], msgspec.Meta(min_length=1)]
    nodes: Annotated[tuple[NodeType, ...], msgspec.Meta(min_length=1)]
    links: tuple[Link, ...] = ()
    relays: Relays = Relays()
    churn: tuple[Churn, ...] = ()
    partitions: tuple[Partition, ...] = ()
    requests: tuple[Requests, ...] = ()

    def __post_init__(self) -> None:
        types = {each.name for each in self.nodes}
        models = {each.name for each in self.models}
        regions = {each.region for each in self.nodes}
        if len(types) < len(self.nodes) or len(models) < len(self.models):
            raise ValueError("two models, or two types of nodes, of one name")
        if self.warm_up_s >= self.duration_s:
            raise ValueError("warm_up_s leaves nothing of duration_s")
        for each in self.nodes:
            _known("model", each.models or (), models, f"nodes {each.name!r}")
            if each.layers:
                _slice(each.layers)
        for churn in self.churn:
            _known("type of nodes", churn.types, types, "churn")
        for asking in self.requests:
            _known("model", (asking.model,), models, "requests")
            _known("type of nodes", asking.gateways, types, "requests")
        for link in self.links:
            _known("region", link.between, regions, "links")
        for partition in self.partitions:
            _known("region", partition.regions, regions, "partitions")


def read_scenario(path: Path) -> Scenario:
    """Raises BadConfig, which says where in the file the mistake is."""
    try:
        return msgspec.convert(tomllib.loads(path.read_text("utf-8")), Scenario)
    except OSError as error:
        raise BadConfig(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, tomllib.TOMLDecodeError) as error:  # msgspec's are ValueErrors
        raise BadConfig(f"{path}: {error}", hint="docs/sim.md explains every name") from None


def size(text: Size) -> int:
    """Bytes of 1500 or "1.5 kB". Raises BadConfig."""
    if isinstance(text, int):
        return text
    number = text.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = text[len(number) :].strip().lower()
    try:
        return round(float(number) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        raise BadConfig(
            f"{text!r} is not a size", hint='write 1500, "24 GB" or "512 MiB"'
        ) from None


def _slice(text: str) -> None:
    try:
        start, stop = map(int, text.split(":"))
        Slice(start, stop)
    except ValueError:
        raise ValueError(f"layers {text!r}: write START:STOP") from None


def _known(what: str, names: tuple[str, ...], known: set[str], where: str) -> None:
    for name in names:
        if name not in known:
            some = ", ".join(sorted(map(repr, known))[:8])
            raise ValueError(f"{where}: there is no {what} {name!r}, only {some}")
