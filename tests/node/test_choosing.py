"""Announcements in placement's terms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msgspec.structs import replace

from shoal.bus import Announcement
from shoal.identity import Identity
from shoal.models.checkpoint import BUILTIN_FOLDER, open_checkpoint
from shoal.node.choosing import candidate, choose, compute_as, fits_into, pool_of, shape_of
from shoal.pipeline import ServingConfig
from shoal.units import ModelId, Slice
from tests.bus.nodes import AMBER, BIRCH, CORAL, STAGE, announcement
from tests.needs import needs

TINY = open_checkpoint("shoal-tiny")
CONFIG = ServingConfig(memory_bytes=1 << 30)
PLENTY = 1 << 30


def node(identity: Identity, offered: int, held: str = "", **changes: object) -> Announcement:
    stage = replace(STAGE, model=TINY.model_id, **changes)
    return announcement(
        identity,
        offered_bytes=offered,
        can_serve=(TINY.model_id,),
        stages=(replace(stage, layers=Slice.parse(held)),) if held else (),
    )


def test_the_first_node_with_room_takes_the_whole_model() -> None:
    assert choose(TINY, node(AMBER, PLENTY), [], CONFIG) == Slice(0, 8)


def test_a_joiner_fills_the_hole_that_a_pinned_node_leaves() -> None:
    pinned = node(BIRCH, PLENTY, "0:5", pinned=True)
    assert choose(TINY, node(AMBER, PLENTY), [pinned], CONFIG) == Slice(5, 8)


def test_two_nodes_too_small_for_the_model_agree_on_a_cut() -> None:
    room = TINY.slice_bytes(Slice(0, 8)) * 2 // 3
    config = ServingConfig(memory_bytes=room, kv_tokens=16)
    amber, birch = node(AMBER, room), node(BIRCH, room)
    cut = [choose(TINY, amber, [birch], config), choose(TINY, birch, [amber], config)]
    assert None not in cut
    first, second = sorted(cut, key=str)
    assert first is not None
    assert second is not None
    assert (first.start, first.stop, second.stop) == (0, second.start, 8)


def test_nodes_that_serve_nothing_or_another_model_take_no_part() -> None:
    idle = announcement(BIRCH, offered_bytes=0, stages=())
    assert choose(TINY, node(AMBER, PLENTY), [idle], CONFIG) == Slice(0, 8)


def test_nothing_fits_into_no_memory() -> None:
    assert choose(TINY, node(AMBER, 1000), [], CONFIG) is None


def test_int8_halves_the_layers_and_gives_a_tied_head_a_matrix_of_its_own() -> None:
    whole, halved = shape_of(TINY, CONFIG), shape_of(TINY, replace_quant(CONFIG))
    for small, large in zip(halved.layer_bytes, whole.layer_bytes, strict=True):
        assert large // 2 < small < large * 0.52  # a scale for each row comes on top
    assert halved.embed_bytes == whole.embed_bytes
    assert whole.tied
    assert not halved.tied


def replace_quant(config: ServingConfig) -> ServingConfig:
    return ServingConfig(memory_bytes=config.memory_bytes, quant="int8")


def test_auto_joins_the_class_that_the_mesh_computes_the_model_in() -> None:
    def joined(*classes: str, **changes: object) -> tuple[str, str | None]:
        others = [node(BIRCH, PLENTY, "0:5", compute=each, **changes) for each in classes]
        return compute_as("auto", None, TINY, others)

    assert joined() == joined("served") == ("int8", None)
    assert joined("int4") == ("int4", None)
    assert joined("bf16", "bf16", "int8") == ("none", "bf16")
    assert joined("int4", state="draining") == ("int8", None)


def test_what_is_asked_for_is_done_whatever_the_mesh_does() -> None:
    others = [node(BIRCH, PLENTY, "0:5", compute="int4")]
    assert compute_as("none", None, TINY, others) == ("none", None)
    assert compute_as("int8", None, TINY, others) == ("int8", None)
    assert compute_as("auto", "f32", TINY, others) == ("none", "f32")


def test_what_another_engine_computes_covers_nothing_for_slices() -> None:
    """It holds all layers, but no route leads through slices and such a stage."""
    slices, served = node(BIRCH, PLENTY, "0:5", pinned=True), node(CORAL, 0, "0:8", pinned=True)
    fronted = replace(served, stages=(replace(served.stages[0], compute="served"),))
    assert choose(TINY, node(AMBER, PLENTY), [slices, fronted], CONFIG) == Slice(5, 8)


def test_auto_leaves_a_gguf_file_as_it_is_packed(tmp_path: Path) -> None:
    needs("gguf")
    from tests.gguf_files import write_gguf

    packed = open_checkpoint(str(write_gguf(BUILTIN_FOLDER, tmp_path / "tiny.gguf")))
    assert compute_as("auto", None, packed, []) == ("none", None)
    assert shape_of(packed, replace_quant(CONFIG)).layer_bytes == tuple(packed.layer_bytes)


def test_a_model_fits_into_a_share_of_memory_or_it_does_not() -> None:
    config = ServingConfig(memory_bytes=0, kv_tokens=100)
    assert fits_into(TINY, None, config, "50%", 10**9)
    assert not fits_into(TINY, None, config, "50%", 20_000_000)
    assert fits_into(TINY, Slice(2, 3), config, "50%", 20_000_000)
    assert not fits_into(TINY, None, config, "8GB", 10**9)


def test_while_we_drain_to_change_over_we_still_count_as_who_holds_the_other_model() -> None:
    """Else the decision to change over would not come out again, and we would never go."""
    stage = replace(STAGE, model=ModelId("f" * 16), state="draining")
    able: dict[str, Any] = {
        "offered_bytes": PLENTY,
        "can_serve": (TINY.model_id,),
        "stages": (stage,),
    }
    me, other = announcement(AMBER, **able), announcement(BIRCH, **able)
    pool = pool_of(me, [other], [candidate(TINY, CONFIG)])
    (member,) = pool.members[TINY.model_id]  # others that drain are on their way elsewhere
    assert member.node == AMBER.node
    assert member.elsewhere == stage.model
