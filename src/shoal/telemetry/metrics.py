"""Prometheus metrics out of events. Names as in vLLM but for the prefix: dashboards carry over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from ..events import (
    BackendChanged,
    ClockSkewed,
    DraftsVerified,
    Event,
    FirstToken,
    Leaving,
    LinkLost,
    LinkUp,
    NodeGone,
    NodeSeen,
    PagesChanged,
    PeerFault,
    PrefixMatched,
    Recovered,
    RelayChanged,
    RequestDone,
    RequestStarted,
    RouteTaken,
    SessionPreempted,
    StageChanged,
    StepDone,
)
from ..units import ModelId, NodeId, SessionId

MAX_LABELS = (
    32  # names beyond these share the label "other": a label must not grow with what others send
)
_WAITS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_STEPS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_TOKENS_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)


class Metrics:
    """A listener for `EventHub`; `render` gives the text format. Each instance has its own."""

    def __init__(self) -> None:
        registry = CollectorRegistry(auto_describe=False)
        self._exposed = _WithoutCreated(registry)
        self._requests = _Requests(registry)
        self._mesh = _Mesh(registry)
        self._stages = _Stages(registry)
        self._pages = _Pages(registry)

    def listen(self, event: Event) -> None:
        """Count one event. Never blocks, never raises on a name that it has not seen."""
        match event:
            case StepDone() | DraftsVerified() | PagesChanged() | StageChanged():
                self._stages.listen(event)
            case PrefixMatched() | SessionPreempted():
                self._pages.listen(event)
            case RequestStarted() | FirstToken() | RouteTaken() | Recovered() | RequestDone():
                self._requests.listen(event)
            case BackendChanged() | ClockSkewed() | Leaving():
                pass  # its stage is counted; a clock is a line of the log
            case _:
                self._mesh.listen(event)

    def render(self) -> bytes:
        return generate_latest(self._exposed)


class _WithoutCreated(Collector):
    """Leaves out the `_created` series; the library can do that only for the whole process."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            created = metric.name + "_created"
            metric.samples = [sample for sample in metric.samples if sample.name != created]
            yield metric


class _Names:
    """Keeps a label's values few: the first MAX_LABELS as they are, the rest as "other"."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def of(self, name: str) -> str:
        if len(self._known) < MAX_LABELS:
            self._known.add(name)
        return name if name in self._known else "other"


@dataclass(slots=True)
class _Open:
    """A request in progress."""

    model: str
    first_token_s: float | None = None


class _Requests:
    """What this gateway did for its clients."""

    def __init__(self, registry: CollectorRegistry) -> None:
        by_model = ("model_name",)
        self._names = _Names()
        self._open: dict[SessionId, _Open] = {}
        self._running = Gauge(
            "shoal_num_requests_running", "Sessions in progress.", by_model, registry=registry
        )
        self._prompt = Counter(
            "shoal_prompt_tokens", "Prompt tokens taken in.", by_model, registry=registry
        )
        self._generated = Counter(
            "shoal_generation_tokens", "Tokens generated.", by_model, registry=registry
        )
        self._ended = Counter(
            "shoal_request_success",
            "Sessions that ended, by how: stop, length, cancelled or an error code.",
            ("model_name", "finished_reason"),
            registry=registry,
        )
        self._reasons = _Names()
        self._first = Histogram(
            "shoal_time_to_first_token_seconds",
            "From the request to its first token.",
            by_model,
            registry=registry,
            buckets=_WAITS_S,
        )
        self._between = Histogram(
            "shoal_request_time_per_output_token_seconds",
            "Mean time between two tokens of a session, one observation per session.",
            by_model,
            registry=registry,
            buckets=_TOKENS_S,
        )
        self._whole = Histogram(
            "shoal_e2e_request_latency_seconds",
            "From the request to its end.",
            by_model,
            registry=registry,
            buckets=_WAITS_S,
        )
        self._recoveries = Counter(
            "shoal_recoveries",
            "Times that a session got another route because one of its stages went away.",
            ["kind"],
            registry=registry,
        )
        self._gaps = Histogram(
            "shoal_recovery_gap_seconds",
            "How long a stream was silent when its route broke.",
            ["kind"],
            registry=registry,
            buckets=_WAITS_S,
        )

    def listen(
        self, event: RequestStarted | FirstToken | RouteTaken | Recovered | RequestDone
    ) -> None:
        match event:
            case RequestStarted(session, model_name, prompt_tokens):
                model = self._names.of(model_name)
                self._open[session] = _Open(model)
                self._running.labels(model).inc()
                self._prompt.labels(model).inc(prompt_tokens)
            case FirstToken(session, model_name, seconds):
                if request := self._open.get(session):
                    request.first_token_s = seconds
                self._first.labels(self._names.of(model_name)).observe(seconds)
            case RouteTaken(kind=kind):
                if kind not in ("new", "queued"):  # those merely waited for pages
                    self._recoveries.labels(kind).inc()
            case Recovered(kind=kind, seconds=seconds):
                self._gaps.labels(kind).observe(seconds)
            case RequestDone():
                self._done(event)

    def _done(self, event: RequestDone) -> None:
        model = self._names.of(event.model_name)
        self._ended.labels(model, self._reasons.of(event.reason)).inc()
        self._generated.labels(model).inc(event.generated_tokens)
        self._whole.labels(model).observe(event.seconds)
        request = self._open.pop(event.session, None)
        if request is None:
            return
        self._running.labels(request.model).dec()
        if request.first_token_s is not None and event.generated_tokens > 1:
            decoding_s = event.seconds - request.first_token_s
            self._between.labels(model).observe(decoding_s / (event.generated_tokens - 1))


class _Mesh:
    """Who is there, and how the neighbours behave."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._nodes: set[NodeId] = set()
        self._links: set[NodeId] = set()
        self._relays: dict[str, bool] = {}
        self._codes = _Names()
        gauges = (
            ("shoal_nodes", "Other nodes of the mesh that announced themselves.", self._nodes),
            ("shoal_links", "Open connections to other nodes.", self._links),
        )
        for name, about, members in gauges:
            Gauge(name, about, registry=registry).set_function(members.__len__)
        Gauge(
            "shoal_relays_connected", "Nostr relays that are connected.", registry=registry
        ).set_function(lambda: sum(self._relays.values()))
        self._faults = Counter(
            "shoal_peer_faults",
            "What other nodes sent that they should not have.",
            ("code",),
            registry=registry,
        )

    def listen(
        self, event: NodeSeen | NodeGone | RelayChanged | LinkUp | LinkLost | PeerFault
    ) -> None:
        match event:
            case NodeSeen(node):
                self._nodes.add(node)
            case NodeGone(node):
                self._nodes.discard(node)
            case LinkUp(node):
                self._links.add(node)
            case LinkLost(node):
                self._links.discard(node)
            case RelayChanged(url, connected):
                self._relays[url] = connected
            case PeerFault(code=code):
                self._faults.labels(self._codes.of(code)).inc()


@dataclass(slots=True)
class _Kept:
    """One model's children, looked up once: `labels()` costs more than counting."""

    seconds: Histogram
    tokens: Counter
    fill: Gauge


class _Stages:
    """What this node computes itself. `model` is the fingerprint of the checkpoint."""

    def __init__(self, registry: CollectorRegistry) -> None:
        by_model = ("model",)
        self._names = _Names()
        self._kept: dict[ModelId, _Kept] = {}
        self._seconds = Histogram(
            "shoal_stage_seconds",
            "One step of this node's stage: one forward of everything that was ready.",
            by_model,
            registry=registry,
            buckets=_STEPS_S,
        )
        self._tokens = Counter(
            "shoal_stage_tokens",
            "Tokens that went through this stage.",
            by_model,
            registry=registry,
        )
        self._fill = Gauge(
            "shoal_kv_cache_usage_perc",
            "Fill of the KV cache, 0 to 1.",
            by_model,
            registry=registry,
        )
        self._drafted = Counter(
            "shoal_spec_decode_num_draft_tokens",
            "Tokens that were guessed and checked by this node's last stage.",
            by_model,
            registry=registry,
        )
        self._accepted = Counter(
            "shoal_spec_decode_num_accepted_tokens",
            "Guessed tokens that were right.",
            by_model,
            registry=registry,
        )
        self._layers = Gauge(
            "shoal_layers_served", "Layers in service on this node.", by_model, registry=registry
        )

    def listen(self, event: StepDone | DraftsVerified | PagesChanged | StageChanged) -> None:
        match event:
            case StepDone():
                kept = self._of(event.model)
                kept.seconds.observe(event.seconds)
                kept.tokens.inc(event.tokens)
            case DraftsVerified(model, drafted, accepted):
                self._drafted.labels(self._names.of(model)).inc(drafted)
                self._accepted.labels(self._names.of(model)).inc(accepted)
            case PagesChanged():
                self._of(event.model).fill.set(event.used)
            case StageChanged():
                served = len(event.layers) if event.state == "serving" else 0
                self._layers.labels(self._names.of(event.model)).set(served)

    def _of(self, model: ModelId) -> _Kept:
        kept = self._kept.get(model)
        if kept is None:
            name = self._names.of(model)
            kept = self._kept[model] = _Kept(
                self._seconds.labels(name), self._tokens.labels(name), self._fill.labels(name)
            )
        return kept


class _Pages:
    """What is not computed because it was kept, and what is computed again."""

    def __init__(self, registry: CollectorRegistry) -> None:
        by_model = ("model",)
        self._names = _Names()
        self._asked = Counter(
            "shoal_prefix_cache_queries",
            "Tokens known when a session began at this node's stage.",
            by_model,
            registry=registry,
        )
        self._hits = Counter(
            "shoal_prefix_cache_hits",
            "Of these, tokens that were left from an earlier session.",
            by_model,
            registry=registry,
        )
        self._preempted = Counter(
            "shoal_num_preemptions",
            "Sessions that made room for older ones and are computed again.",
            by_model,
            registry=registry,
        )

    def listen(self, event: PrefixMatched | SessionPreempted) -> None:
        model = self._names.of(event.model)
        match event:
            case PrefixMatched(asked_tokens=asked, hit_tokens=hits):
                self._asked.labels(model).inc(asked)
                self._hits.labels(model).inc(hits)
            case SessionPreempted():
                self._preempted.labels(model).inc()
