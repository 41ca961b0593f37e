"""Who might take the place of a stage that is gone, as far as announcements tell."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from shoal.errors import ModelNotFound, NoRoute, Relief
from shoal.models.catalogue import Catalogue
from shoal.models.checkpoint import open_checkpoint
from shoal.node.relief import relief
from shoal.node.router import Router
from shoal.pipeline import Wish
from shoal.units import ModelId, Slice
from tests.bus.nodes import AMBER, BIRCH, STAGE, announcement

TINY = open_checkpoint("shoal-tiny")
MODEL, OTHER = TINY.model_id, ModelId("f" * 16)
HALF = replace(STAGE, model=MODEL, layers=Slice(0, 4))


@pytest.mark.parametrize(
    ("stage", "node", "expected"),
    [
        ({}, {}, "possible"),
        ({"model": OTHER}, {}, "possible"),  # it may change over
        ({}, {"can_serve": (OTHER,)}, "none"),
        ({}, {"offered_bytes": 0}, "none"),
        ({"pinned": True}, {}, "none"),
        ({"compute": "served"}, {}, "none"),
        ({"state": "joining"}, {}, "coming"),
        ({"state": "joining", "pinned": True}, {}, "coming"),
        ({"state": "joining", "model": OTHER}, {}, "possible"),
        ({"state": "draining"}, {}, "coming"),  # on its way to another place
        ({"state": "draining", "pinned": True}, {}, "none"),  # on its way out
    ],
)
def test_help_comes_from_who_may_move(
    stage: dict[str, Any], node: dict[str, Any], expected: Relief
) -> None:
    said: dict[str, Any] = {"offered_bytes": 1 << 20, "can_serve": (MODEL,), **node}
    one = announcement(BIRCH, stages=(replace(HALF, **stage),), **said)
    assert relief(MODEL, [one]) == expected


def router(*stages: Any, free: bool) -> Router:
    catalogue = Catalogue()
    catalogue.known("shoal-tiny")
    node = announcement(
        BIRCH, stages=stages, offered_bytes=1 << 20, can_serve=(MODEL,) if free else ()
    )
    return Router(
        AMBER.node,
        catalogue,
        lambda: iter((BIRCH.node, stage) for stage in stages),
        frozenset,
        announcements=lambda: [node],
    )


def test_who_asks_for_a_route_hears_whether_help_is_to_be_expected() -> None:
    with pytest.raises(NoRoute) as halved:
        router(HALF, free=True).plan(Wish("shoal-tiny", 1))
    with pytest.raises(ModelNotFound) as gone:
        router(free=True).plan(Wish("shoal-tiny", 1))
    assert halved.value.relief == gone.value.relief == "possible"
    with pytest.raises(ModelNotFound) as alone:
        router(free=False).plan(Wish("shoal-tiny", 1))
    assert alone.value.relief == "none"


def test_of_those_who_are_gone_no_help_is_expected() -> None:
    with pytest.raises(NoRoute) as lost:
        router(HALF, free=True).plan(Wish("shoal-tiny", 1, avoid=frozenset({BIRCH.node})))
    assert lost.value.relief == "none"
