from hypothesis import given
from hypothesis import strategies as st

from shoal.models.stop_strings import StopStrings

few_letters = st.text("ab", max_size=12)
stop_lists = st.lists(st.text("ab", max_size=4), max_size=3)


def in_the_whole_text(text: str, stops: list[str]) -> tuple[str, bool]:
    """Try every end from the left, and at each end the longest stop string first."""
    for end in range(1, len(text) + 1):
        for start in range(end):
            if text[start:end] in stops:
                return text[:start], True
    return text, False


@given(st.lists(few_letters, max_size=8), stop_lists)
def test_any_cutting_gives_what_a_search_of_the_whole_text_gives(
    pieces: list[str], stops: list[str]
) -> None:
    matcher = StopStrings(stops)
    answers = [matcher.push(piece) for piece in pieces]
    text = "".join(emit for emit, _ in answers) + matcher.flush()
    assert (text, matcher.stopped) == in_the_whole_text("".join(pieces), stops)


@given(st.lists(few_letters, max_size=8), stop_lists)
def test_no_more_is_held_back_than_may_become_a_stop_string(
    pieces: list[str], stops: list[str]
) -> None:
    matcher = StopStrings(stops)
    for piece in pieces:
        matcher.push(piece)
    held = matcher.flush()
    assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


def test_a_stop_string_over_two_pieces_is_never_shown() -> None:
    matcher = StopStrings(["\nUser:"])
    assert matcher.push("Hi\nUs") == ("Hi", False)
    assert matcher.push("er: next") == ("", True)
    assert matcher.push("more") == ("", True)
    assert matcher.flush() == ""


def test_held_back_text_comes_out_when_the_stop_string_does_not() -> None:
    matcher = StopStrings(["\nUser:"])
    assert matcher.push("Hi\nUs") == ("Hi", False)
    assert matcher.push("ually") == ("\nUsually", False)


def test_without_stop_strings_text_passes_at_once() -> None:
    assert StopStrings([""]).push("anything") == ("anything", False)
