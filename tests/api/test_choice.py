from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.api.choice import ChoiceText, Piece
from shoal.engine.request import Sampled

from .stub import TOKENIZER

END = TOKENIZER.eos_ids[0]


def pieces_of(text: str, stops: list[str], finish: str = "stop") -> list[Piece]:
    """All pieces up to the end, for a text that the engine ends with `finish`."""
    choice, pieces = ChoiceText(TOKENIZER, stops), []
    ids = TOKENIZER.encode(text)
    sampled = [Sampled(token, "", -1.0) for token in ids]
    if finish == "stop":
        sampled.append(Sampled(END, "stop", -1.0))
    else:
        sampled[-1] = Sampled(ids[-1], finish, -1.0)
    for item in sampled:
        pieces.append(choice.push(item))
        if pieces[-1].finish:
            return pieces
    pytest.fail("no piece said that the text ends")


@settings(max_examples=60)
@given(st.text(min_size=1, max_size=20), st.sampled_from(["stop", "length"]))
def test_pieces_add_up_to_the_text_and_its_tokens(text: str, finish: str) -> None:
    pieces = pieces_of(text, [], finish)
    assert "".join(piece.text for piece in pieces) == text
    tokens = [placed[1].token for piece in pieces for placed in piece.tokens]
    assert tokens == TOKENIZER.encode(text)


@settings(max_examples=60)
@given(
    st.text("abé", min_size=1, max_size=12),
    st.lists(st.text("abé", min_size=1, max_size=3), max_size=3),
)
def test_nothing_of_a_stop_string_is_shown(text: str, stops: list[str]) -> None:
    pieces = pieces_of(text, stops)
    shown = "".join(piece.text for piece in pieces)
    assert text.startswith(shown)
    assert not any(stop in shown for stop in stops)
    if shown != text:
        assert any(text[len(shown) :].startswith(stop) for stop in stops)
        assert pieces[-1].finish == "stop"


@settings(max_examples=60)
@given(
    st.text("abé", min_size=1, max_size=12),
    st.lists(st.text("abé", min_size=1, max_size=3), max_size=3),
)
def test_tokens_come_with_their_text_and_are_cut_with_it(text: str, stops: list[str]) -> None:
    shown, tokens = "", []
    for piece in pieces_of(text, stops):
        shown += piece.text
        tokens += piece.tokens
        assert all(start < len(shown) for start, _ in tokens)
    assert b"".join(TOKENIZER.token_bytes(s.token) for _, s in tokens).decode() == shown


def test_a_token_that_ends_the_text_is_counted_but_not_shown() -> None:
    choice = ChoiceText(TOKENIZER, [])
    choice.push(Sampled(TOKENIZER.encode("a")[0]))
    assert choice.push(Sampled(TOKENIZER.encode("b")[0], "stop")) == Piece("", (), "stop")
    assert choice.tokens == 2
