from collections import Counter

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
