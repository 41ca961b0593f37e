from hypothesis import given
from hypothesis import strategies as st

from shoal.bus.limits import Bounded, Buckets, TokenBucket


@given(st.lists(st.floats(0, 20), min_size=1, max_size=200).map(sorted))
def test_a_bucket_never_gives_more_than_burst_and_rate_allow(times: list[float]) -> None:
    bucket = TokenBucket(per_s=2, burst=5)
    taken = sum(bucket.take(now) for now in times)
    assert taken <= 5 + 2 * (times[-1] - times[0]) + 1e-6


def test_a_bucket_refills() -> None:
    bucket = TokenBucket(per_s=1, burst=1)
    assert [bucket.take(now) for now in (0, 0.5, 1.5, 1.6)] == [True, False, True, False]


def test_a_clock_that_steps_back_gives_nothing_away() -> None:
    bucket = TokenBucket(per_s=1, burst=1)
    assert [bucket.take(now) for now in (100, 0, 0.5)] == [True, False, False]


def test_one_key_does_not_use_up_anothers_bucket() -> None:
    buckets: Buckets[str] = Buckets(per_s=1, burst=1)
    assert [buckets.take(key, 0) for key in "aab"] == [True, False, True]


def test_buckets_and_memories_stay_small() -> None:
    memory: Bounded[int, None] = Bounded(3)
    for key in (1, 2, 3, 1, 4):
        memory[key] = None
    assert list(memory) == [3, 1, 4]
    buckets: Buckets[int] = Buckets(per_s=1, burst=1, limit=3)
    for key in range(100):
        buckets.take(key, 0)
    assert len(buckets._buckets) == 3
