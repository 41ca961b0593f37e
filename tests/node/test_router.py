"""Which models there are and by which route, from what strangers announce."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from shoal.bus import StageOffer
from shoal.errors import ModelNotFound, NoRoute
from shoal.hardware import Speed
from shoal.models.catalogue import Catalogue
from shoal.models.checkpoint import open_checkpoint
from shoal.node.report import model_reports
from shoal.node.router import MAX_MODELS, Router
from shoal.pipeline import Wish
from shoal.placement import Held
from shoal.placement.routes import MAX_STAGES, few_of_each
from shoal.units import ModelId, NodeId, Slice
from tests.bus.nodes import AMBER, BIRCH, CORAL, STAGE, announcement

TINY = open_checkpoint("shoal-tiny")
OURS = replace(STAGE, model=TINY.model_id)


def offer(layers: str, **changes: object) -> StageOffer:
    return replace(OURS, layers=Slice.parse(layers), **changes)


def router(*offers: tuple[NodeId, StageOffer], doubtful: frozenset[NodeId] = frozenset()) -> Router:
    catalogue = Catalogue()
    catalogue.known("shoal-tiny")  # as the node does, off its event loop
    return Router(AMBER.node, catalogue, lambda: iter(offers), lambda: doubtful)


def test_a_route_goes_over_those_who_hold_the_layers() -> None:
    plan = router((AMBER.node, offer("0:4")), (BIRCH.node, offer("4:8"))).plan(
        Wish("shoal-tiny", 100)
    )
    assert [(stop.node, str(stop.layers)) for stop in plan.stops] == [
        (AMBER.node, "0:4"),
        (BIRCH.node, "4:8"),
    ]
    assert plan.model == TINY.model_id


def test_doubtful_and_avoided_nodes_are_left_out() -> None:
    offers = [(AMBER.node, offer("0:4")), (BIRCH.node, offer("4:8")), (CORAL.node, offer("4:8"))]
    one = router(*offers).plan(Wish("shoal-tiny", 1, avoid=frozenset({BIRCH.node})))
    other = router(*offers, doubtful=frozenset({CORAL.node})).plan(Wish("shoal-tiny", 1))
    assert [one.stops[1].node, other.stops[1].node] == [CORAL.node, BIRCH.node]
    with pytest.raises(NoRoute, match="4"):
        router(*offers[:2]).plan(Wish("shoal-tiny", 1, avoid=frozenset({BIRCH.node})))


def test_another_checkpoint_under_our_models_name_is_never_used() -> None:
    """The gateway tokenises with its own files: an impostor's layers would answer nonsense."""
    impostor = replace(STAGE, model=ModelId("f" * 16), layers=Slice(0, 8))
    found = router((BIRCH.node, impostor))
    assert found.model_names() == []
    with pytest.raises(ModelNotFound):
        found.plan(Wish("shoal-tiny", 1))


@pytest.mark.parametrize("name", ["shoal-tiny", "a_folder"])
def test_a_model_is_one_whatever_its_nodes_call_it(name: str) -> None:
    """One gave the hub's id to --model, the other a folder with the same files."""
    folder = offer("4:8", model_name="a_folder")
    plan = router((AMBER.node, offer("0:4")), (BIRCH.node, folder)).plan(Wish(name, 100))
    assert [stop.node for stop in plan.stops] == [AMBER.node, BIRCH.node]


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../secrets", "~/models", "a/b/c", "no/such-model"]
)
def test_a_name_from_a_peer_is_never_a_path_and_never_downloaded(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "shoal.models.hub.fetch", lambda *_, **__: pytest.fail("went to the network")
    )
    catalogue = Catalogue()
    assert catalogue.known(name) is None


def test_a_liars_layer_count_makes_a_model_of_its_own() -> None:
    honest = announcement(AMBER, stages=(offer("0:8"),))
    liar = announcement(BIRCH, stages=(offer("0:8", total_layers=4000),))
    reports = model_reports([honest, liar])
    assert [(r["total_layers"], r["ready"]) for r in reports] == [(8, True), (4000, False)]


def test_a_liar_with_the_smallest_id_decides_neither_layers_nor_context() -> None:
    liar = offer("0:7", total_layers=7, context_length=0)
    found = router((CORAL.node, liar), (BIRCH.node, offer("0:8")))
    assert [stop.node for stop in found.plan(Wish("shoal-tiny", 1)).stops] == [BIRCH.node]
    assert found.best_offer("shoal-tiny").context_length == TINY.context_length


def test_a_model_we_have_no_files_of_is_what_most_nodes_say_it_is() -> None:
    strange = replace(STAGE, model_name="org/strange", layers=Slice(0, 8))
    liar = replace(strange, model=ModelId("f" * 16))
    found = router((AMBER.node, liar), (BIRCH.node, strange), (CORAL.node, strange))
    assert found.best_offer("org/strange").model == strange.model


def test_the_gateway_knows_which_tokens_exist() -> None:
    plan = router((BIRCH.node, offer("0:8"))).plan(Wish("shoal-tiny", 1))
    assert plan.vocab_size == TINY.vocab_size


def test_thousands_of_stages_leave_a_few_of_every_slice() -> None:
    crowd = [(NodeId(f"npub{n}"), offer("0:4", speed=Speed())) for n in range(3000)]
    slow = (BIRCH.node, offer("4:8", speed=Speed(layer_s=9.0)))
    found = router(*crowd, slow)
    assert found.plan(Wish("shoal-tiny", 1)).stops[1].node == BIRCH.node
    held = [
        Held(NodeId(str(n)), Slice(0, 4), "serving", "f32", Speed(), 0, 0, 9) for n in range(900)
    ]
    assert len(few_of_each(held, 1)) == MAX_STAGES


def test_names_without_end_hide_no_model_of_ours() -> None:
    noise = [
        (NodeId(f"npub{n}"), replace(STAGE, model_name=f"org/noise-{n % 300}")) for n in range(3000)
    ]
    names = router(*noise, (AMBER.node, offer("0:8"))).model_names()
    assert "shoal-tiny" in names
    assert len(names) <= MAX_MODELS + 1


def test_a_stranger_with_many_models_does_not_make_the_report_long() -> None:
    noise = tuple(offer("0:8", model=ModelId(f"{n:016x}")) for n in range(32))
    crowd = [announcement(AMBER, stages=(offer("0:8"), *noise[:3]))]
    crowd += [announcement(BIRCH, stages=(offer("0:8", total_layers=n + 9),)) for n in range(200)]
    assert len(model_reports(crowd)) == 64
