import base64

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import BadTicket
from shoal.identity import Ticket
from shoal.identity.ticket import PREFIX, _checksum

TICKET = Ticket(
    secret=bytes(range(32)), relays=("ws://192.168.1.4:7471",), addresses=("[fe80::1]:7472",)
)
TEXT = TICKET.encode()
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
places = st.integers(0, len(TEXT) - 1)

tickets = st.builds(
    lambda mesh, hosts, port: Ticket(
        mesh=mesh,
        relays=tuple(f"wss://{host}/nostr" for host in hosts),
        addresses=tuple(f"{host}:{port}" for host in hosts),
    ),
    mesh=st.from_regex(r"[a-z0-9]{1,20}", fullmatch=True),
    hosts=st.lists(st.from_regex(r"[a-z0-9.-]{1,20}", fullmatch=True), max_size=8),
    port=st.integers(1, 65535),
)


@given(tickets)
def test_a_ticket_survives_being_copied(ticket: Ticket) -> None:
    assert Ticket.decode(ticket.encode()) == ticket


def test_case_spaces_and_line_breaks_of_pasting_do_not_matter() -> None:
    pasted = "\n  ".join(TEXT.lower()[i : i + 20] for i in range(0, len(TEXT), 20)) + " \r\n"
    assert Ticket.decode(pasted) == TICKET


def test_a_qr_code_stores_a_ticket_in_its_dense_mode() -> None:
    assert set(TEXT) <= set(ALPHABET)


def test_every_single_changed_character_is_refused() -> None:
    for at, now in enumerate(TEXT):
        for other in "A2Q7" if at % 8 else ALPHABET:
            if other != now:
                with pytest.raises(BadTicket):
                    Ticket.decode(TEXT[:at] + other + TEXT[at + 1 :])


def test_every_dropped_doubled_or_added_character_is_refused() -> None:
    for at in range(len(TEXT)):
        for mangled in (
            TEXT[:at] + TEXT[at + 1 :],
            TEXT[:at] + TEXT[at] + TEXT[at:],
            TEXT[:at] + "A" + TEXT[at:],
        ):
            with pytest.raises(BadTicket):
                Ticket.decode(mangled)
    with pytest.raises(BadTicket):
        Ticket.decode(TEXT + "A")


def test_every_cut_ticket_is_refused_with_what_to_do() -> None:
    for length in range(len(TEXT)):
        with pytest.raises(BadTicket) as refused:
            Ticket.decode(TEXT[:length])
        assert "whole ticket" in refused.value.hint


@given(places, places)
def test_two_swapped_characters_are_refused(first: int, second: int) -> None:
    swapped = list(TEXT)
    swapped[first], swapped[second] = swapped[second], swapped[first]
    mangled = "".join(swapped)
    if mangled == TEXT:
        return
    with pytest.raises(BadTicket):
        Ticket.decode(mangled)


@settings(max_examples=60)
@given(st.one_of(st.text(), st.text().map(lambda text: PREFIX + text)))
def test_any_other_text_is_refused(text: str) -> None:
    with pytest.raises(BadTicket):
        Ticket.decode(text)


def _with_valid_checksum(body: bytes) -> str:
    return PREFIX + base64.b32encode(_checksum(body) + body).decode().rstrip("=")


@settings(max_examples=60)
@given(st.binary(max_size=60))
def test_a_body_with_a_right_checksum_still_has_to_be_a_ticket(body: bytes) -> None:
    with pytest.raises(BadTicket):
        Ticket.decode(_with_valid_checksum(body))


@pytest.mark.parametrize(
    "fields",
    [
        ["", b"", [], []],
        ["a", b"x" * 32, [], []],
        ["", b"x" * 31, [], []],
        ["a" * 65, b"", [], []],
        ["a", b"", ["http://host"], []],
        ["a", b"", ["ws://host"] * 9, []],
        ["a", b"", [], ["host:1"] * 17],
        ["a", b"", [], ["host:0"]],
        ["a", b"", [], [], "more"],
    ],
)
def test_a_ticket_from_a_stranger_is_checked_field_by_field(fields: list[object]) -> None:
    with pytest.raises(BadTicket):
        Ticket.decode(_with_valid_checksum(msgspec.msgpack.encode(fields)))


def test_a_huge_paste_is_refused_without_being_read() -> None:
    with pytest.raises(BadTicket, match="too long"):
        Ticket.decode(PREFIX + "A" * 1_000_000)


def test_a_ticket_does_not_show_its_secret() -> None:
    assert repr(TICKET.secret) not in repr(TICKET)
