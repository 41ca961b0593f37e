"""Several models in one mesh."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from shoal.placement import Member, Pool, Wanted, decide
from shoal.units import ModelId, NodeId, Slice

from .pools import even, roomy

LLAMA, QWEN = ModelId("llama"), ModelId("qwen")
LAYERS = 8
RATE = 200.0  # tokens/s, well below what one node gives


def free(node: str) -> Member:
    return Member(NodeId(node), roomy(LAYERS))


def holding(node: str, part: str = "0:8") -> Member:
    return Member(NodeId(node), roomy(LAYERS), Slice.parse(part))


def pool(
    demand: Mapping[ModelId, float],
    llama: Sequence[Member],
    qwen: Sequence[Member],
    both: Sequence[Member] = (),
) -> Pool:
    """Whoever holds one model could hold the other as well."""

    def of(model: ModelId, own: Sequence[Member], others: Sequence[Member]) -> list[Member]:
        elsewhere = QWEN if model == LLAMA else LLAMA
        able = [replace(one, layers=None, elsewhere=elsewhere) for one in others]
        return [*own, *able, *both]

    wanted = tuple(Wanted(model, even(LAYERS), demand.get(model, 0.0)) for model in (LLAMA, QWEN))
    return Pool(wanted, {LLAMA: of(LLAMA, llama, qwen), QWEN: of(QWEN, qwen, llama)})


def models(mesh: Pool, *nodes: str) -> list[ModelId | None]:
    return [decide(NodeId(node), mesh).model for node in nodes]


def test_a_free_node_takes_the_model_that_is_asked_for_more() -> None:
    llama, qwen = [holding("amber")], [holding("birch")]
    assert models(pool({QWEN: 500.0, LLAMA: 1.0}, llama, qwen, [free("cedar")]), "cedar") == [QWEN]
    assert models(pool({LLAMA: 500.0}, llama, qwen, [free("cedar")]), "cedar") == [LLAMA]


def test_a_hole_in_a_served_model_comes_before_a_wish_for_another_one() -> None:
    mesh = pool({QWEN: 900.0}, [holding("amber", "0:5")], [], [free("birch")])
    decision = decide(NodeId("birch"), mesh)
    assert decision.model == LLAMA
    assert decision.layers is not None
    assert decision.layers.stop == LAYERS


def test_free_nodes_do_not_all_run_to_the_same_model() -> None:
    mesh = pool({LLAMA: 100.0, QWEN: 100.0}, [], [], [free(f"n{i}") for i in range(6)])
    chosen = models(mesh, *(f"n{i}" for i in range(6)))
    assert sorted(map(str, chosen)) == ["llama"] * 3 + ["qwen"] * 3


def test_one_of_two_leaves_a_model_that_nobody_asks_for_and_the_other_stays() -> None:
    mesh = pool({QWEN: RATE}, [holding("amber"), holding("birch")], [])
    assert sorted(map(str, models(mesh, "amber", "birch"))) == ["llama", "qwen"]


def test_the_last_one_to_hold_a_layer_stays_whatever_is_asked_for() -> None:
    mesh = pool({QWEN: 1e6}, [holding("amber", "0:4"), holding("birch", "4:8")], [])
    assert models(mesh, "amber", "birch") == [LLAMA, LLAMA]


def test_nobody_leaves_a_model_that_would_then_lack_what_is_asked_of_it() -> None:
    mesh = pool({LLAMA: 1e6, QWEN: 1e6}, [holding("amber"), holding("birch")], [])
    assert models(mesh, "amber", "birch") == [LLAMA, LLAMA]


def test_nodes_do_not_swing_between_two_models() -> None:
    """Whoever has left one for the other is not called back by the same demand."""
    llama = {name: holding(name) for name in ("amber", "birch", "cedar")}
    qwen: dict[str, Member] = {}
    moves = 0
    for _ in range(12):
        for name in ("amber", "birch", "cedar"):
            mesh = pool({LLAMA: RATE, QWEN: RATE}, list(llama.values()), list(qwen.values()))
            now = LLAMA if name in llama else QWEN
            if decide(NodeId(name), mesh).model not in (now, None):
                here, there = (llama, qwen) if now == LLAMA else (qwen, llama)
                there[name] = here.pop(name)
                moves += 1
    assert moves == 1
    assert len(qwen) == 1
