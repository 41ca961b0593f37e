"""Hundreds of short stories of kills, pauses, partitions, outages and lies, each by its seed.

SHOAL_FAULT_SEEDS=1000 plays more of them; `scripts/soak_faults.py` plays long ones without end.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from shoal.sim.faults import LONG, SHORT, WEIGHTS, Act, Broken, Story, make_story, play

SEEDS = int(os.environ.get("SHOAL_FAULT_SEEDS", "200"))
BATCH = 10  # seeds of one test, so that several processes share them
LONG_SEEDS = range(3)


@pytest.mark.parametrize("first", range(0, SEEDS, BATCH))
def test_whatever_happens_nothing_is_lost_and_the_mesh_recovers(first: int) -> None:
    whole = asked = 0
    for seed in range(first, min(SEEDS, first + BATCH)):
        outcome = play(make_story(seed, SHORT))
        whole, asked = whole + outcome.whole, asked + outcome.asked
    assert whole > 0.6 * asked, "nearly all could have been answered"


@pytest.mark.parametrize("seed", LONG_SEEDS)
def test_nor_in_larger_meshes_with_more_faults(seed: int) -> None:
    outcome = play(make_story(seed, LONG))
    assert outcome.whole > 0.6 * outcome.asked


def test_what_a_liar_left_in_the_pages_of_others_is_not_met_when_it_begins_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second answer fills its own pages again, the third would find those of both."""
    monkeypatch.setattr("shoal.sim.liars.OFTEN", 1.0)
    asked = (Act(at_s, "ask", ("n2",), number=20) for at_s in (22.0, 32.0, 35.0))
    lie = Act(21.0, "lie", ("n1",), 4.0, lie="wrong")
    outcome = play(Story(1, 6, (3, 3), (0.0, 0.0), 1, 0.0, (lie, *asked)))
    assert outcome.whole == outcome.asked == 5


def test_a_story_plays_the_same_in_another_process() -> None:
    def digest(hash_seed: str) -> str:
        code = "from shoal.sim.faults import *\nprint(play(make_story(3, SHORT)).digest)"
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert digest("1") == digest("2")


def test_a_promise_that_is_broken_is_told_with_the_story(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.sim.asked.Asked.is_right", False)
    story = make_story(1, SHORT)
    with pytest.raises(Broken) as broken:
        play(story)
    assert "another text at n" in str(broken.value)
    assert f"seed 1: {story.layers} layers" in str(broken.value)


def test_who_is_stopped_can_be_asked_to_leave() -> None:
    acts = Act(25.0, "stop", ("n1",), 20.0), Act(26.0, "leave", ("n1",), 5.0)
    story = Story(1, 6, (6, 6, 6), (0.0, 0.0, 0.0), 1, 0.0, acts)
    assert play(story).asked == 3  # at the end, of each node


def test_all_kinds_of_faults_are_tried() -> None:
    acts = [act for seed in range(200) for act in make_story(seed, LONG).acts]
    assert {act.what for act in acts} == {"ask", *WEIGHTS}
    assert {"garbage", "wrong", "blames"} <= {act.lie for act in acts if act.what == "lie"}


def test_an_act_reads_as_a_line() -> None:
    act = Act(21.5, "slow", ("n3",), 2.0, 10)
    assert str(act) == "  21.50 s  until   23.50 s  slow        n3 10 times"
