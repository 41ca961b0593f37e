import pytest

from shoal.engine.threads import RECENT, TRIALS, TRY_AGAIN, ThreadTuner


def run(tuner: ThreadTuner, seconds_with: dict[int, float], steps: int, tokens: int = 1) -> None:
    for _ in range(steps):
        tuner.took(tokens, seconds_with[tuner.count])


IDLE = {1: 1.0, 2: 0.6, 4: 0.4}
BUSY = {1: 1.1, 2: 3.0, 4: 4.0}


def test_the_fastest_count_is_found_and_kept() -> None:
    tuner = ThreadTuner(4)
    run(tuner, IDLE, 3 * TRIALS)
    assert tuner.count == 4
    run(tuner, IDLE, 1000)
    assert tuner.count == 4


def test_one_thread_is_taken_on_a_busy_machine() -> None:
    tuner = ThreadTuner(4)
    run(tuner, BUSY, 3 * TRIALS)
    assert tuner.count == 1


def test_a_machine_that_gets_busy_is_noticed_within_some_steps() -> None:
    tuner = ThreadTuner(4)
    run(tuner, IDLE, 100)
    run(tuner, BUSY, RECENT + 3 * TRIALS)
    assert tuner.count == 1


def test_a_machine_that_calms_down_is_noticed_in_the_end() -> None:
    tuner = ThreadTuner(4)
    run(tuner, BUSY, 100)
    run(tuner, IDLE, TRY_AGAIN + 3 * TRIALS)
    assert tuner.count == 4


def test_larger_steps_and_longer_contexts_are_no_change_of_the_machine() -> None:
    tuner = ThreadTuner(4)
    run(tuner, IDLE, 100)
    run(tuner, {4: 40.0}, 1, tokens=512)
    seconds = 0.4
    for _ in range(2000):
        seconds *= 1.001
        tuner.took(1, seconds)
        tuner.took(512, 40.0)
        assert tuner.count == 4


@pytest.mark.parametrize(("tokens", "seconds", "layers"), [(400, 100.0, 8), (1, 0.1, 2)])
def test_steps_of_another_size_do_not_disturb_the_comparison(
    tokens: int, seconds: float, layers: int
) -> None:
    tuner = ThreadTuner(2)
    for _ in range(2 * TRIALS):
        tuner.took(1, {1: 1.0, 2: 0.6}[tuner.count], layers=8)
        tuner.took(tokens, seconds, layers)
    assert tuner.count == 2


def test_one_core_needs_no_trial() -> None:
    tuner = ThreadTuner(1)
    run(tuner, {1: 1.0}, 10)
    assert tuner.count == 1
    with pytest.raises(ValueError, match="0 threads"):
        ThreadTuner(0)
