"""The twin of a stage: its text is right through any split, and wrong once a row is not."""

from __future__ import annotations

import itertools
from array import array

import pytest

from shoal.engine.request import Sampling
from shoal.engine.rows import Row
from shoal.hardware import Speed
from shoal.sim.engine import SimSampler, SimStage, SimStageConfig, by_speed, more_bytes
from shoal.sim.model import SimModel
from shoal.transport import Frame
from shoal.units import SessionId, Slice

TOY = SimModel("toy", (1,) * 9, kv_bytes=1, activation_bytes=5000)
PAGES = (3, 1, 4, 2, 0, 5, 7, 6)
PROMPT = tuple(range(100, 121))
ONE = SessionId("one")


class Chain:
    """Stages one after the other, asked row by row."""

    def __init__(self, *cuts: int) -> None:
        self.spent_s = 0.0
        edges = (0, *cuts, TOY.layers)
        config = SimStageConfig(4, 8)
        timing = by_speed(Speed(layer_s=1.0))
        self.stages = [
            SimStage(TOY, Slice(a, b), config, timing, self._spend)
            for a, b in itertools.pairwise(edges)
        ]
        self.sampler = SimSampler(Sampling(temperature=0, max_tokens=50), PROMPT, ())

    def _spend(self, seconds: float) -> None:
        self.spent_s += seconds

    def ask(
        self, start: int, ids: tuple[int, ...], *, pages: tuple[int, ...] = PAGES, ends: bool = True
    ) -> int | None:
        hidden = None
        for stage in self.stages:
            first = stage.layers.start == 0
            sampler = self.sampler if ends and stage is self.stages[-1] else None
            row = Row(
                ONE,
                start,
                pages,
                len(ids),
                ids=ids if first else None,
                hidden=hidden,  # type: ignore[arg-type]  # the twin's are bytes
                sampler=sampler,  # type: ignore[arg-type]
            )
            result = stage.step([row])
            if not stage.model.last:
                wire = stage.hidden_to_wire(result, [row], [0])
                hidden = stage.hidden_from_wire(wire, len(ids))
        return result.sampled[0][0].token if sampler else None

    def text(self, count: int) -> list[int]:
        """The prompt in two chunks, then token by token."""
        self.ask(0, PROMPT[:8], ends=False)
        tokens = [self.ask(8, PROMPT[8:])]
        while len(tokens) < count:
            tokens.append(self.ask(len(PROMPT) + len(tokens) - 1, (tokens[-1],)))
        return tokens


@pytest.mark.parametrize("cuts", [(), (4,), (1, 8), (3, 5, 6)])
def test_the_text_does_not_depend_on_the_split(cuts: tuple[int, ...]) -> None:
    chain = Chain(*cuts)
    assert chain.text(10) == TOY.expected(PROMPT, 10)
    assert chain.spent_s == 11 * TOY.layers


def test_a_row_that_is_missing_changes_the_text() -> None:
    chain = Chain(4)
    chain.ask(0, PROMPT[:8], ends=False)
    assert chain.ask(12, PROMPT[12:]) != TOY.expected(PROMPT, 1)[0]


def test_a_page_of_somebody_else_changes_the_text_sooner_or_later() -> None:
    chain, right = Chain(4), TOY.expected(PROMPT, 10)
    assert chain.text(4) == right[:4]
    page = chain.stages[1]._pages[PAGES[2]]
    page.chains, page.before = array("Q", [1, 2, 3, 4]), 9
    tokens = [chain.ask(len(PROMPT) + at - 1, (right[at - 1],)) for at in range(4, 10)]
    assert tokens != right[4:]


def test_layers_that_were_not_computed_before_change_the_text() -> None:
    chain = Chain(4)
    chain.ask(0, PROMPT[:8], ends=False)
    for page in chain.stages[1]._pages.values():
        page.parts = [Slice(5, 9)] * 4
    assert chain.ask(8, PROMPT[8:]) != TOY.expected(PROMPT, 1)[0]


def test_hidden_states_weigh_what_they_stand_for() -> None:
    chain = Chain(4)
    row = Row(ONE, 0, PAGES, 8, ids=PROMPT[:8])
    stage = chain.stages[0]
    body = bytes(stage.hidden_to_wire(stage.step([row]), [row], [0]))
    assert len(body) + more_bytes(Frame(1, b"x", body)) == 8 * TOY.activation_bytes
    assert more_bytes(Frame(1, b"x", bytes(48))) == 0
