import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.identity.places import check_relay_url, split_address


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("10.0.0.1:80", ("10.0.0.1", 80)),
        ("host.example:65535", ("host.example", 65535)),
        ("[::1]:7472", ("::1", 7472)),
    ],
)
def test_an_address_is_a_host_and_a_port(text: str, place: tuple[str, int]) -> None:
    assert split_address(text) == place


@pytest.mark.parametrize(
    "text",
    ["", "host", ":1", "host:", "host:0", "host:65536", "host:+1", "host:1 ", "::1:80", "[x]:1",
     "[::1]", "a b:1", "host:٣", "h" * 130 + ":1", "user@host:1", "host/:1"],
)  # fmt: skip
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        split_address(text)


@pytest.mark.parametrize("url", ["ws://127.0.0.1:7471", "wss://relay.example/path?x", "ws://[::1]"])
def test_a_relay_is_a_websocket(url: str) -> None:
    assert check_relay_url(url) == url


@pytest.mark.parametrize(
    "url",
    ["", "http://host", "ws://", "ws://:80", "ws://host:0", "ws://host:99999", "ws://ho st",
     "ws://user:password@host", "ws://host\n", "ws://hößt", "ws://[::g]", "ws://[::1", "host",
     "file:///etc/passwd", "ws://" + "h" * 300],
)  # fmt: skip
def test_what_is_no_relay_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        check_relay_url(url)


@given(st.text(max_size=40))
def test_any_text_is_either_a_place_or_a_value_error(text: str) -> None:
    for read in (check_relay_url, split_address):
        for candidate in (text, f"ws://{text}", f"host:{text}", f"[{text}]:1"):
            with contextlib.suppress(ValueError):
                assert read(candidate)
