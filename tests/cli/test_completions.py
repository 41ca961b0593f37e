from __future__ import annotations

import pytest

from shoal.cli.client import NodeClient, base_url, error_of
from shoal.cli.completions import Piece, Tally, pieces, stream_answer
from shoal.errors import InvalidRequest, LocalError, NoRoute, StageLost

from .fake_node import FakeNode


def test_a_streamed_completion_is_its_pieces_and_its_count(fake_node: FakeNode) -> None:
    got = list(stream_answer(NodeClient(fake_node.url), "/v1/completions", {"prompt": "def f"}))
    assert "".join(piece.text for piece in got) == "    if n < 2: return n"
    assert got[-2:] == [Piece(finish="length"), Piece(tokens=3)]
    path, body = fake_node.asked[0]
    assert path == "/v1/completions"
    assert body["stream"] is True
    assert body["stream_options"] == {"include_usage": True}


def test_chat_pieces_are_read_the_same_way(fake_node: FakeNode) -> None:
    got = stream_answer(NodeClient(fake_node.url), "/v1/chat/completions", {"messages": []})
    assert "".join(piece.text for piece in got) == "    if n < 2: return n"


def test_a_stream_that_merely_ends_is_an_error(fake_node: FakeNode) -> None:
    fake_node.cut_after = 2
    with pytest.raises(LocalError, match="broke off"):
        list(stream_answer(NodeClient(fake_node.url), "/v1/completions", {}))


def test_an_error_in_mid_stream_keeps_its_class_and_its_words() -> None:
    event = 'data: {"error": {"message": "stage 3:5 died", "code": "stage_lost"}}'
    with pytest.raises(StageLost, match="stage 3:5 died"):
        list(pieces([event]))


def test_heartbeats_and_other_fields_are_skipped() -> None:
    lines = [": still here", "event: x", 'data: {"choices": [{"text": "a"}]}', "", "data: [DONE]"]
    assert list(pieces(lines)) == [Piece("a")]


def test_garbage_in_a_stream_is_an_error_of_ours() -> None:
    with pytest.raises(LocalError, match="cannot be read"):
        list(pieces(["data: {nonsense"]))


def test_a_refused_request_has_the_exit_code_of_its_error() -> None:
    error = error_of({"message": "nobody holds 3:5", "code": "no_route"})
    assert isinstance(error, NoRoute)
    assert error.exit_code == 4


def test_an_unknown_code_is_kept() -> None:
    assert error_of({"message": "x", "code": "brand_new"}).code == "brand_new"


def test_the_tally_counts_tokens_and_rates_the_ones_after_the_first() -> None:
    tally = Tally()
    assert tally.tokens_per_second == 0
    for piece in (Piece("a"), Piece("b", "stop"), Piece(tokens=2)):
        tally.add(piece)
    assert (tally.text, tally.finish, tally.tokens) == ("ab", "stop", 2)
    assert tally.tokens_per_second > 0
    assert tally.ttft_s >= 0


@pytest.mark.parametrize(
    ("written", "url"),
    [
        ("http://127.0.0.1:7470", "http://127.0.0.1:7470"),
        ("127.0.0.1:7470", "http://127.0.0.1:7470"),
        ("http://127.0.0.1:7470/v1/", "http://127.0.0.1:7470"),
        ("https://mesh.example/shoal", "https://mesh.example/shoal"),
    ],
)
def test_addresses_are_read_as_people_write_them(written: str, url: str) -> None:
    assert base_url(written) == url


@pytest.mark.parametrize("written", ["ftp://x", "http://", ""])
def test_an_address_that_leads_nowhere_is_a_usage_error(written: str) -> None:
    with pytest.raises(InvalidRequest, match="no address"):
        base_url(written)
