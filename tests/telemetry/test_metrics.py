from __future__ import annotations

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from shoal.events import (
    DraftsVerified,
    EventHub,
    FirstToken,
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
from shoal.telemetry import Metrics
from shoal.telemetry.metrics import MAX_LABELS
from shoal.units import ModelId, NodeId, SessionId, Slice

AMBER, STILL = NodeId("npub1amber"), NodeId("npub1still")
TINY = ModelId("00112233445566ff")


def families(metrics: Metrics) -> dict[str, Metric]:
    found = text_string_to_metric_families(metrics.render().decode())
    return {family.name: family for family in found}


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    for family in families(metrics).values():
        for sample in family.samples:
            if sample.name == name and sample.labels == labels:
                return sample.value
    return None


def request(metrics: Metrics, session: str, model: str = "tiny", reason: str = "stop") -> None:
    id_ = SessionId(session)
    metrics.listen(RequestStarted(id_, model, 10))
    metrics.listen(FirstToken(id_, model, 0.5))
    metrics.listen(RequestDone(id_, model, reason, 5, 2.5))


def test_requests_are_counted_from_their_start_to_their_end() -> None:
    metrics = Metrics()
    metrics.listen(RequestStarted(SessionId("b"), "tiny", 7))
    request(metrics, "a")
    tiny = {"model_name": "tiny"}
    assert value(metrics, "shoal_num_requests_running", **tiny) == 1
    assert value(metrics, "shoal_prompt_tokens_total", **tiny) == 17
    assert value(metrics, "shoal_generation_tokens_total", **tiny) == 5
    assert value(metrics, "shoal_request_success_total", finished_reason="stop", **tiny) == 1
    assert value(metrics, "shoal_time_to_first_token_seconds_sum", **tiny) == 0.5
    assert value(metrics, "shoal_e2e_request_latency_seconds_sum", **tiny) == 2.5
    assert value(metrics, "shoal_request_time_per_output_token_seconds_sum", **tiny) == 0.5


def test_a_request_without_a_token_has_no_time_between_tokens() -> None:
    metrics = Metrics()
    metrics.listen(RequestStarted(SessionId("a"), "tiny", 7))
    metrics.listen(RequestDone(SessionId("a"), "tiny", "no_route", 0, 0.1))
    name = "shoal_request_time_per_output_token_seconds_count"
    assert value(metrics, name, model_name="tiny") is None
    assert value(metrics, "shoal_num_requests_running", model_name="tiny") == 0


def test_the_mesh_is_counted_by_members_not_by_messages() -> None:
    metrics, hub = Metrics(), EventHub()
    hub.listen(metrics.listen)
    for event in (
        NodeSeen(AMBER, "amber-fox"),
        NodeSeen(AMBER, "amber-fox"),
        NodeSeen(STILL, "still-lake"),
        NodeGone(STILL, "goodbye"),
        NodeGone(STILL, "goodbye"),
        LinkUp(AMBER),
        LinkUp(STILL),
        LinkLost(STILL, "reset"),
        RelayChanged("wss://a", True),
        RelayChanged("wss://b", True),
        RelayChanged("wss://b", False),
        PeerFault(None, "bad_frame", 1),
        RouteTaken(SessionId("a"), (), 1),
        RouteTaken(SessionId("a"), (), 2, "queued"),
        RouteTaken(SessionId("a"), (), 3, "replayed"),
        Recovered(SessionId("a"), "replayed", 0.3, 12),
    ):
        hub.emit(event)
    assert value(metrics, "shoal_nodes") == 1
    assert value(metrics, "shoal_links") == 1
    assert value(metrics, "shoal_relays_connected") == 1
    assert value(metrics, "shoal_peer_faults_total", code="bad_frame") == 1
    assert value(metrics, "shoal_recoveries_total", kind="replayed") == 1
    assert value(metrics, "shoal_recoveries_total", kind="queued") is None
    assert value(metrics, "shoal_recovery_gap_seconds_sum", kind="replayed") == 0.3


def test_a_stage_reports_its_steps_and_its_cache() -> None:
    metrics = Metrics()
    metrics.listen(StageChanged(TINY, Slice(2, 8), "serving"))
    metrics.listen(StepDone(TINY, 2, 33, 0.25))
    metrics.listen(StepDone(TINY, 2, 2, 0.25))
    metrics.listen(PagesChanged(TINY, 0.75))
    metrics.listen(DraftsVerified(TINY, 5, 3))
    assert value(metrics, "shoal_stage_seconds_sum", model=TINY) == 0.5
    assert value(metrics, "shoal_stage_seconds_count", model=TINY) == 2
    assert value(metrics, "shoal_stage_tokens_total", model=TINY) == 35
    assert value(metrics, "shoal_kv_cache_usage_perc", model=TINY) == 0.75
    assert value(metrics, "shoal_spec_decode_num_draft_tokens_total", model=TINY) == 5
    assert value(metrics, "shoal_spec_decode_num_accepted_tokens_total", model=TINY) == 3
    assert value(metrics, "shoal_layers_served", model=TINY) == 6
    metrics.listen(StageChanged(TINY, Slice(2, 8), "left"))
    assert value(metrics, "shoal_layers_served", model=TINY) == 0


def test_a_stage_reports_what_it_did_not_compute_again_and_what_it_has_to() -> None:
    metrics = Metrics()
    metrics.listen(PrefixMatched(TINY, 40, 32))
    metrics.listen(PrefixMatched(TINY, 10, 0))
    metrics.listen(SessionPreempted(TINY))
    assert value(metrics, "shoal_prefix_cache_queries_total", model=TINY) == 50
    assert value(metrics, "shoal_prefix_cache_hits_total", model=TINY) == 32
    assert value(metrics, "shoal_num_preemptions_total", model=TINY) == 1


def test_labels_do_not_grow_with_the_names_that_others_choose() -> None:
    metrics = Metrics()
    for number in range(MAX_LABELS + 10):
        request(metrics, str(number), model=f"model-{number}", reason=f"reason-{number}")
        metrics.listen(PeerFault(None, f"code-{number}", 1))
    samples = families(metrics)["shoal_request_success"].samples
    assert len({sample.labels["model_name"] for sample in samples}) == MAX_LABELS + 1
    assert len({sample.labels["finished_reason"] for sample in samples}) == MAX_LABELS + 1
    assert sum(sample.value for sample in samples) == MAX_LABELS + 10
    assert value(metrics, "shoal_peer_faults_total", code="other") == 10
    assert value(metrics, "shoal_num_requests_running", model_name="other") == 0


def test_two_nodes_in_one_process_count_for_themselves() -> None:
    first, second = Metrics(), Metrics()
    request(first, "a")
    assert value(second, "shoal_prompt_tokens_total", model_name="tiny") is None


def test_there_are_no_created_series() -> None:
    metrics = Metrics()
    request(metrics, "a")
    metrics.listen(StepDone(TINY, 1, 1, 0.1))
    assert b"_created" not in metrics.render()
