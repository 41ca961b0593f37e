import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engine.pace import Pace, SpeedMeter, Work
from shoal.engine.rows import Row
from shoal.hardware import Speed
from shoal.units import SessionId, Slice

LAYERS = 10
TRUE = Speed(step_s=1e-3, layer_s=1e-3, token_s=2e-5, context_s=1e-8, sample_s=3e-4)
WRONG = Speed(step_s=5e-4, layer_s=8e-4, token_s=4e-5, context_s=2e-8, sample_s=1e-4)


def works(chance: random.Random, count: int) -> list[Work]:
    """Steps as a busy stage has them: few tokens mostly, prompts now and then."""
    sizes = [chance.choice([1, 1, 1, 4, 8, 32, 100, 256]) for _ in range(count)]
    return [Work(n, n * chance.randrange(50, 2000), min(n, 8)) for n in sizes]


def seconds(speed: Speed, work: Work) -> float:
    return speed.seconds(LAYERS, work.tokens, work.context, work.sampled)


def far_off(speed: Speed, true: Speed, chance: random.Random) -> float:
    """The median relative error over steps of all kinds."""
    errors = sorted(
        abs(seconds(speed, work) / seconds(true, work) - 1) for work in works(chance, 101)
    )
    return errors[50]


def test_rows_are_counted_as_the_formula_counts_them() -> None:
    prompt = Row(SessionId("p"), 10, (), 3)  # its tokens attend to 11, 12 and 13
    token = Row(SessionId("g"), 20, (), 1, sampler=object())  # type: ignore[arg-type]
    assert Work.of([prompt, token]) == (4, 36 + 21, 1)


@settings(max_examples=20)
@given(st.integers(0, 10**6))
def test_what_was_expected_wrongly_is_corrected(seed: int) -> None:
    chance = random.Random(seed)
    meter = SpeedMeter(LAYERS, WRONG)
    assert far_off(meter.speed, TRUE, chance) > 0.1
    for work in works(chance, 300):
        meter.observe(work, seconds(TRUE, work) * chance.uniform(0.9, 1.1))
    assert far_off(meter.speed, TRUE, chance) < 0.03


def test_steps_of_parts_of_the_layers_teach_what_all_of_them_cost() -> None:
    chance, meter = random.Random(5), SpeedMeter(LAYERS, WRONG)
    pace = Pace(meter, 3.0, 512, 16)
    for _ in range(300):
        parts = chance.sample([None, Slice(0, 4), Slice(4, 10), Slice(3, 5)], chance.choice([1, 2]))
        rows = [
            Row(SessionId(str(part)), chance.randrange(2000), (), chance.choice([1, 1, 40]))
            for part in parts
        ]
        rows = [replace(each, layers=part) for each, part in zip(rows, parts, strict=True)]
        took = TRUE.step_s * (1 - len(rows))
        for each in rows:
            work = Work.of([each])
            layers = LAYERS if each.layers is None else len(each.layers)
            took += TRUE.seconds(layers, work.tokens, work.context)
        pace.observe(rows, took * chance.uniform(0.9, 1.1))
    fixed = meter.speed.step_s + LAYERS * meter.speed.layer_s
    assert fixed == pytest.approx(TRUE.step_s + LAYERS * TRUE.layer_s, rel=0.1)
    assert meter.speed.token_s == pytest.approx(TRUE.token_s, rel=0.1)


def test_what_was_never_seen_stays_as_expected() -> None:
    meter = SpeedMeter(LAYERS, TRUE)
    for _ in range(200):
        meter.observe(Work(1, 100, 1), seconds(TRUE, Work(1, 100, 1)))
    assert meter.speed.token_s == pytest.approx(TRUE.token_s, rel=0.05)


def test_an_hour_of_single_tokens_does_not_wash_out_a_prompt() -> None:
    meter, prompt = SpeedMeter(LAYERS, WRONG), Work(256, 256 * 128, 0)
    for _ in range(5):
        meter.observe(prompt, seconds(TRUE, prompt))
    for _ in range(2000):
        meter.observe(Work(1, 100, 1), seconds(TRUE, Work(1, 100, 1)))
    assert seconds(meter.speed, prompt) == pytest.approx(seconds(TRUE, prompt), rel=0.1)


def test_a_machine_that_gets_busy_is_believed_soon() -> None:
    chance, meter = random.Random(1), SpeedMeter(LAYERS, WRONG)
    for work in works(chance, 300):
        meter.observe(work, seconds(TRUE, work))
    for work in works(chance, 600):
        meter.observe(work, 3 * seconds(TRUE, work))
    now = meter.speed
    assert seconds(now, Work(1, 500, 1)) == pytest.approx(
        3 * seconds(TRUE, Work(1, 500, 1)), rel=0.1
    )


def test_one_step_that_was_disturbed_changes_little() -> None:
    chance, meter = random.Random(1), SpeedMeter(LAYERS, WRONG)
    for work in works(chance, 300):
        meter.observe(work, seconds(TRUE, work))
    meter.observe(Work(1, 500, 1), 30.0)
    assert seconds(meter.speed, Work(1, 500, 1)) < 1.5 * seconds(TRUE, Work(1, 500, 1))


def test_experts_are_read_as_far_as_tokens_are_sent_to_them() -> None:
    chance = random.Random(2)
    true = Speed(layer_s=1e-3, experts_s=2e-2, routed=0.06, token_s=1e-6)
    meter = SpeedMeter(LAYERS, Speed(layer_s=2e-3, experts_s=1e-2, routed=0.06, token_s=5e-6))
    for work in works(chance, 400):
        meter.observe(work, seconds(true, work))
    assert far_off(meter.speed, true, chance) < 0.05
