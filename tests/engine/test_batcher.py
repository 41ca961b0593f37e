from collections import Counter
from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engine.batcher import Batcher, BatcherConfig, chunk_prompt
from shoal.engine.rows import Row
from shoal.units import SessionId

CONFIG = BatcherConfig(max_tokens=8, max_rows=4)
A, B, C = SessionId("a"), SessionId("b"), SessionId("c")


def row(session: str, start: int, count: int) -> Row:
    return Row(SessionId(session), start, (0,), count)


def emptied(batcher: Batcher) -> list[list[Row]]:
    steps = []
    while step := batcher.take():
        steps.append(step)
    return steps


@given(st.lists(st.integers(0, 200), max_size=90), st.integers(1, 40))
def test_chunks_are_the_prompt_cut_at_fixed_positions(ids: list[int], size: int) -> None:
    chunks = list(chunk_prompt(ids, size))
    assert [token for _, chunk in chunks for token in chunk] == ids
    assert [start for start, _ in chunks] == list(range(0, len(ids), size))


def test_the_first_chunks_of_a_longer_prompt_are_those_of_the_shorter() -> None:
    assert list(chunk_prompt(range(700)))[:2] == list(chunk_prompt(range(512)))


@settings(max_examples=80)
@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from([1, 1, 2, 5, 11]), st.booleans())))
def test_rows_are_neither_lost_nor_doubled_nor_overtaken(
    arrivals: list[tuple[int, int, bool]],
) -> None:
    batcher = Batcher(CONFIG)
    added: list[Row] = []
    taken: list[Row] = []
    for number, (session, count, take) in enumerate(arrivals):
        added.append(row(str(session), number, count))
        batcher.add(added[-1])
        if take:
            taken += batcher.take()
    taken += [each for step in emptied(batcher) for each in step]
    assert Counter(map(id, taken)) == Counter(map(id, added))
    for session in {each.session for each in added}:
        starts = [each.start for each in taken if each.session == session]
        assert starts == sorted(starts)


@settings(max_examples=80)
@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from([1, 2, 5, 8, 11]))))
def test_a_step_is_bounded_and_has_one_row_a_session(arrivals: list[tuple[int, int]]) -> None:
    batcher = Batcher(CONFIG)
    for number, (session, count) in enumerate(arrivals):
        batcher.add(row(str(session), number, count))
    for step in emptied(batcher):
        assert len(step) <= CONFIG.max_rows
        assert len({each.session for each in step}) == len(step)
        prompt = [each.count for each in step if each.count > 1]
        assert sum(prompt) <= CONFIG.max_tokens or len(prompt) == 1


def test_what_generates_comes_before_prompts() -> None:
    batcher = Batcher(CONFIG)
    batcher.add(row("a", 0, 5))
    batcher.add(row("b", 7, 1))
    assert [each.session for each in batcher.take()] == [B, A]


def test_prompts_of_several_sessions_take_turns() -> None:
    batcher = Batcher(CONFIG)
    for start in (0, 8, 16):
        batcher.add(row("a", start, 8))
    batcher.add(row("b", 0, 8))
    assert [step[0].session for step in emptied(batcher)] == [A, B, A, A]


def test_a_prompt_gets_on_while_many_sessions_generate() -> None:
    batcher = Batcher(CONFIG)
    batcher.add(row("a", 0, 8))
    for turn in range(3):
        for session in "vwxyz":
            batcher.add(row(session, turn, 1))
    assert A in {each.session for each in batcher.take()}


def test_sessions_that_generate_take_turns_when_they_do_not_all_fit() -> None:
    batcher = Batcher(CONFIG)
    turns: Counter[str] = Counter()
    ready = [SessionId(name) for name in "uvwxyz"]
    for turn in range(20):
        for session in ready:
            batcher.add(row(session, turn, 1))
        ready = [each.session for each in batcher.take()]
        turns.update(ready)
    assert max(turns.values()) - min(turns.values()) <= 1


def test_a_dropped_session_leaves_nothing_behind_and_the_others_stay() -> None:
    batcher = Batcher(CONFIG)
    batcher.add(row("a", 0, 8))
    batcher.add(row("a", 8, 1))
    batcher.add(row("b", 4, 1))
    batcher.drop(A)
    batcher.drop(C)
    assert [[each.session for each in step] for step in emptied(batcher)] == [[B]]
    assert len(batcher) == 0


def test_a_row_with_a_draft_goes_with_those_that_generate() -> None:
    batcher = Batcher(BatcherConfig(max_tokens=8, max_rows=4))
    drafted = Row(A, 7, (0,), 3, draft=(5, 6))
    batcher.add(row("prompt", 0, 8))
    batcher.add(drafted)
    assert batcher.take()[0] is drafted


def test_drafts_beyond_the_room_of_a_step_wait_and_rows_without_one_do_not() -> None:
    batcher = Batcher(BatcherConfig(max_drafted=2))
    rows = [
        Row(A, 7, (0,), 3, draft=(5, 6)),
        Row(B, 7, (0,), 2, draft=(5,)),
        row("c", 7, 1),
        Row(SessionId("d"), 7, (0,), 4, draft=(1, 2, 3)),
    ]
    for each in rows:
        batcher.add(each)
    assert emptied(batcher) == [[rows[0], rows[2]], [rows[1]], [rows[3]]]


# ---- owners take turns


def test_owners_take_turns_before_their_sessions_do() -> None:
    batcher = Batcher(CONFIG)
    for session in "abc":
        batcher.add(replace(row(session, 0, 8), owner="crowd"))
    batcher.add(replace(row("z", 0, 8), owner="one"))
    assert [step[0].session for step in emptied(batcher)] == ["a", "z", "b", "c"]


@settings(max_examples=40)
@given(st.lists(st.sampled_from([2, 3, 5, 8]), min_size=3, max_size=3), st.booleans())
def test_no_owner_that_always_has_prompts_gets_far_ahead_of_another(
    sizes: list[int], any_cut: bool
) -> None:
    batcher = Batcher(BatcherConfig(max_tokens=8, max_rows=1, granule=1, any_cut=any_cut))
    had: Counter[str] = Counter()
    for start in range(200):
        for owner, size in enumerate(sizes):
            for session in range(owner + 1):  # the more sessions, the more turns, if they counted
                batcher.add(replace(row(f"{owner} {session}", start, size), owner=str(owner)))
    for _ in range(60):
        for each in batcher.take():
            had[each.owner] += each.count
    assert max(had.values()) - min(had.values()) <= 2 * max(sizes)


# ---- those who generate keep their pace

PACED = BatcherConfig(max_tokens=512, pace=3.0, granule=16, any_cut=True)


def paced(config: BatcherConfig = PACED, steps: int = 20) -> Batcher:
    """A step takes 10 ms, and 0.1 ms more for each prompt token."""
    batcher = Batcher(config)
    for _ in range(steps):
        batcher.observe([row("g", 0, 1)], 0.010)
        batcher.observe([row("g", 0, 1), row("p", 0, 100)], 0.020)
    return batcher


def test_beside_sessions_that_generate_a_prompt_gets_what_leaves_them_their_pace() -> None:
    batcher = paced()
    batcher.add(row("p", 0, 512))
    batcher.add(row("g", 9, 1))
    assert [each.count for each in batcher.take()] == [1, 200]  # 10 ms + 200 * 0.1 ms = 3 * 10 ms


def test_when_nobody_generates_prompts_get_all_there_is() -> None:
    batcher = paced()
    batcher.add(row("p", 0, 512))
    assert [each.count for each in batcher.take()] == [512]


def test_a_session_that_generates_elsewhere_in_its_ring_counts_until_it_is_dropped() -> None:
    batcher = paced()
    batcher.add(row("g", 9, 1))
    batcher.take()
    batcher.add(row("p", 0, 600))
    assert [each.count for each in batcher.take()] == [200]
    batcher.drop(SessionId("g"))
    assert [each.count for each in batcher.take()] == [400]


def test_however_slow_prompts_are_they_get_on_by_a_granule() -> None:
    batcher = paced()
    for _ in range(30):
        batcher.observe([row("p", 0, 10)], 5.0)
    batcher.add(row("g", 9, 1))
    batcher.add(row("p", 0, 512))
    assert [each.count for each in batcher.take()] == [1, 16]


def test_where_a_cut_could_change_the_result_chunks_stay_whole() -> None:
    batcher = paced(replace(PACED, any_cut=False))
    batcher.add(row("g", 9, 1))
    batcher.add(row("p", 0, 256))
    batcher.add(row("q", 0, 256))
    assert [each.count for each in batcher.take()] == [1, 256]


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(2, 200)), min_size=1, max_size=12),
    st.floats(0.001, 0.1),
    st.floats(1e-6, 0.01),
)
def test_the_budget_is_kept_and_every_prompt_ends(
    prompts: list[tuple[int, int]], step_s: float, token_s: float
) -> None:
    batcher = Batcher(replace(PACED, max_rows=4))
    left: Counter[str] = Counter()
    for number, (owner, count) in enumerate(prompts):
        session = f"p{number}"
        batcher.add(Row(SessionId(session), 0, (0,), count, tuple(range(count)), owner=str(owner)))
        left[session] = count
    seen: dict[str, list[int]] = {session: [] for session in left}
    for turn in range(3000):
        if not left:
            break
        batcher.add(row("g", turn, 1))
        step = batcher.take()
        assert "g" in {each.session for each in step}
        chunks = [each for each in step if each.session != "g"]
        many = sum(each.count for each in chunks)
        assert chunks, "prompts always get on"
        if turn > 100:  # it has learnt
            allowed = max(PACED.granule, 2.0 * step_s / token_s * 1.3 + 1)
            assert many <= allowed + len(chunks)
        assert many <= PACED.max_tokens
        for each in chunks:
            seen[each.session] += each.ids or ()
            left[each.session] -= each.count
        left = +left
        batcher.observe(step, step_s + token_s * many)
        batcher.observe([row("g", turn, 1)], step_s)
    assert not left
    for number, (_, count) in enumerate(prompts):
        assert seen[f"p{number}"] == list(range(count))


def test_a_cut_prompt_keeps_its_sampler_and_its_bytes_to_the_end() -> None:
    sampler: Any = object()
    whole = Row(A, 4, (0,), 5, sampler=sampler, wire=memoryview(bytes(range(10))))
    head, rest = whole.cut(2)
    assert (head.start, head.count, head.sampler) == (4, 2, None)
    assert (rest.start, rest.count, rest.sampler) == (6, 3, sampler)
    assert head.wire is not None
    assert rest.wire is not None
    assert bytes(head.wire) + bytes(rest.wire) == bytes(range(10))
