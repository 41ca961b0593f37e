from shoal.transport.door import BanConfig, Bans, Door, DoorConfig, TokenBucket


def test_strangers_are_bounded_in_all_and_per_network() -> None:
    door = Door(DoorConfig(max_strangers=3, max_strangers_per_network=2))
    assert [door.enter("a", 0.0) for _ in range(3)] == [True, True, False]
    assert [door.enter("b", 0.0) for _ in range(2)] == [True, False]
    door.leave("a")
    assert door.enter("b", 0.0)


def test_a_network_that_misbehaves_often_stays_outside_for_a_while() -> None:
    door = Door(DoorConfig(bans=BanConfig(free_points=2, first_s=1.0)))
    for _ in range(2):
        door.blame("a", 1, 0.0)
    assert door.enter("a", 0.0)
    door.blame("a", 1, 0.0)
    assert not door.enter("a", 0.9)
    assert door.enter("b", 0.9)
    assert door.enter("a", 1.1)


def test_bans_grow_up_to_a_limit_and_are_forgotten() -> None:
    bans: Bans[str] = Bans(BanConfig(first_s=1.0, longest_s=5.0, forget_after_s=100.0))
    bans.blame("amber", 1, 0.0)
    assert bans.banned("amber", 0.9)
    assert not bans.banned("amber", 1.0)
    bans.blame("amber", 1, 1.0)
    assert bans.banned("amber", 2.9)
    bans.blame("amber", 10**6, 3.0)
    assert bans.banned("amber", 7.9)
    assert not bans.banned("amber", 8.0)
    bans.blame("amber", 1, 200.0)
    assert not bans.banned("amber", 201.0)


def test_the_memory_for_culprits_is_bounded() -> None:
    bans: Bans[int] = Bans(BanConfig())
    for culprit in range(5000):
        bans.blame(culprit, 10, 0.0)
    assert not bans.banned(0, 0.1)
    assert bans.banned(4999, 0.1)


def test_a_token_bucket_lets_a_burst_pass_and_then_the_rate() -> None:
    bucket = TokenBucket(bytes_per_s=100, burst_s=2, now=0.0)
    assert bucket.take(200, 0.0) == 0.0
    assert bucket.take(50, 0.0) == 0.5
    assert bucket.take(50, 1.0) == 0.0
