"""What was computed with the help of a node is not met again once our link to it was lost."""

from collections.abc import Callable

import pytest

from shoal.engine.request import Sampled, Sampling
from shoal.pipeline import eras
from shoal.pipeline.eras import Eras
from shoal.pipeline.generation import Generation
from shoal.pipeline.messages import Close, Opened, TokenEntry
from shoal.pipeline.plans import GenerationConfig, Instruction, Plan, Request, Stop, Tell
from shoal.units import ModelId, NodeId, SessionId, Slice

A, B, C = map(NodeId, "abc")
SESSION = SessionId("5" * 16)
PLAN = Plan(ModelId("toy"), "f32", (Stop(A, Slice(0, 3)), Stop(B, Slice(3, 6))))
PAGE = 4


def started(era: Callable[[NodeId], int]) -> Generation:
    """A prompt of two pages, and so many tokens that there is another."""
    request = Request("toy", tuple(range(2 * PAGE)), Sampling(max_tokens=4 * PAGE))
    config = GenerationConfig(page_tokens=PAGE, replay=False)
    generation = Generation(request, lambda: SESSION, config, era=era)
    generation.begin()
    generation.route(PLAN)
    for node in (B, A):
        generation.opened(Opened(SESSION), node)
    for index in range(2 * PAGE):
        generation.token(TokenEntry(SESSION, index, Sampled(index)), B)
    return generation


def named(instructions: list[Instruction]) -> set[int]:
    """How many pages each Close names."""
    tells = [each for each in instructions if isinstance(each, Tell)]
    return {len(each.digests) for each in tells if isinstance(each.message, Close)}


def test_each_loss_begins_another_era_of_that_node_alone() -> None:
    known = Eras()
    before = known.of(A), known.of(B)
    known.lost(A)
    first = known.of(A)
    known.lost(A)
    assert len({before[0], first, known.of(A)}) == 3
    assert known.of(B) == before[1]


def test_no_era_comes_back_when_there_are_more_nodes_than_are_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(eras, "MAX_NODES", 2)
    known = Eras()
    seen: list[tuple[int, ...]] = []
    for node in (A, B, C, B, A, C, C, A):
        known.lost(node)
        seen.append(tuple(map(known.of, (A, B, C))))
    for each in zip(*seen, strict=True):
        assert list(each) == sorted(each)
    assert len(known._last) == 2


def test_a_node_that_comes_back_is_on_other_routes_than_before() -> None:
    """Its process may have begun anew under the same name, and have put nonsense into the pages of
    others before.
    """
    known = Eras()
    first, again = (started(known.of)._digests for _ in range(2))
    known.lost(B)
    later = started(known.of)._digests
    assert first == again
    assert not set(first) & set(later)


def test_what_was_begun_in_one_era_gets_no_name_of_the_next() -> None:
    known = Eras()
    generation = started(known.of)
    root = generation._root
    known.lost(B)
    assert named(generation.cancel()) == {2}
    assert generation._root == root != started(known.of)._root


def test_pages_computed_beside_who_was_lost_get_no_names() -> None:
    generation = started(Eras().of)
    assert named(generation.node_lost(B, "killed")) == {0}
