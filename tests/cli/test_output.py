from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.cli.output import BAR_HELD, age, bar, duration, printable, table


def test_a_table_is_aligned_with_four_spaces_between_columns() -> None:
    text = table(("NAME", "ID"), [("shoal-tiny", "0123"), ("x", "4567")])
    assert text == "NAME          ID\nshoal-tiny    0123\nx             4567"


def test_a_table_without_rows_is_its_headers() -> None:
    assert table(("NAME", "ID"), []) == "NAME    ID"


def test_a_peers_name_moves_no_cursor() -> None:
    assert printable("\x1b[2Jevil\r\x07") == "[2Jevil"
    assert "\x1b" not in table(("NAME",), [("\x1b[31mred",)])


@given(st.integers(1, 200), st.integers(1, 60), st.data())
def test_a_slice_is_always_seen_and_the_bar_never_longer(
    total: int, width: int, drawn: st.DataObject
) -> None:
    start = drawn.draw(st.integers(0, total - 1))
    stop = drawn.draw(st.integers(start + 1, total))
    drawing = bar(start, stop, total, width)
    assert len(drawing) == width
    assert BAR_HELD in drawing


def test_slices_side_by_side_fill_the_bar_without_overlap() -> None:
    assert bar(0, 3, 8, 8) == "███·····"
    assert bar(3, 8, 8, 8) == "···█████"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "now"),
        (3, "3 seconds ago"),
        (75, "about a minute ago"),
        (130, "2 minutes ago"),
        (3700, "about an hour ago"),
        (7300, "2 hours ago"),
    ],
)
def test_ages_read_as_people_say_them(seconds: float, words: str) -> None:
    assert age(seconds) == words


@pytest.mark.parametrize(
    ("seconds", "words"), [(75, "75 s"), (125, "2 min"), (7300, "2 h"), (180000, "2 d")]
)
def test_durations_have_one_unit(seconds: float, words: str) -> None:
    assert duration(seconds) == words
