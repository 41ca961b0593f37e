from hypothesis import given
from hypothesis import strategies as st

from shoal.transport.heartbeat import HeartbeatConfig, Pulse, check

CONFIG = HeartbeatConfig(beat_after_s=0.25, dead_after_s=0.9)


def look(pulse: Pulse, now: float, late_s: float = 0.0) -> tuple[bool, bool, float]:
    found = check({"amber": pulse}, now, late_s, CONFIG)
    return bool(found.beat), bool(found.dead), found.next_in_s


def test_a_silent_link_gets_a_beat() -> None:
    assert look(Pulse(heard_at=10.0, said_at=9.75), now=10.0)[0]


def test_a_link_that_carries_frames_gets_none() -> None:
    assert not look(Pulse(heard_at=10.0, said_at=9.9), now=10.0)[0]


def test_a_peer_silent_for_too_long_is_dead() -> None:
    assert not look(Pulse(heard_at=9.11, said_at=10.0), now=10.0)[1]
    assert look(Pulse(heard_at=9.1, said_at=10.0), now=10.0)[1]


def test_the_next_look_is_when_the_first_link_could_be_dead() -> None:
    assert abs(look(Pulse(heard_at=9.2, said_at=10.0), now=10.0)[2] - 0.1) < 1e-9


def test_the_silence_that_we_slept_through_is_not_the_peers() -> None:
    pulse = Pulse(heard_at=9.8, said_at=9.8)
    assert not look(pulse, now=15.0, late_s=4.95)[1]
    assert look(pulse, now=16.0)[1]


def test_what_was_heard_after_a_late_wake_up_does_not_count_twice() -> None:
    pulse = Pulse(heard_at=15.0, said_at=15.0)
    look(pulse, now=15.0, late_s=5.0)
    assert pulse.heard_at == 15.0


def test_a_link_that_we_do_not_read_is_not_dead() -> None:
    assert not look(Pulse(heard_at=0.0, said_at=10.0, deaf=True), now=10.0)[1]


def test_a_death_is_found_within_the_limit_for_any_history() -> None:
    now, pulse = 0.0, Pulse(heard_at=0.0, said_at=0.0)
    while True:
        beat, dead, wait_s = look(pulse, now)
        if dead:
            break
        if beat:
            pulse.said_at = now
        now += max(wait_s, 1e-6)
    assert 0.9 <= now < 0.9001


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=40))
def test_many_links_share_few_wake_ups_and_no_gap_exceeds_the_interval(starts: list[float]) -> None:
    pulses = {i: Pulse(heard_at=1.0, said_at=start) for i, start in enumerate(starts)}
    now, looks = 1.0, 0
    while now < 3.0:
        for pulse in pulses.values():
            pulse.heard_at = now
        found = check(pulses, now, 0.0, CONFIG)
        for key in found.beat:
            assert now - pulses[key].said_at <= 0.2501 or now == 1.0
            pulses[key].said_at = now
        now += max(found.next_in_s, 1e-6)
        looks += 1
    assert looks <= 45  # 2 s, at most one look per quarter of an interval and a few to fall in step
