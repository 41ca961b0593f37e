import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.transport.addresses import (
    WILDCARDS,
    format_address,
    is_loopback,
    network_of,
    parse_address,
    reachable_hosts,
)


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("192.0.2.1:7471", ("192.0.2.1", 7471)),
        ("[2001:db8::1]:7471", ("2001:db8::1", 7471)),
        ("example.org:1", ("example.org", 1)),
        ("2001:db8::1", None),
        ("memory:npub1x", None),
        ("192.0.2.1:0", None),
        ("192.0.2.1:65536", None),
        ("192.0.2.1:٣", None),
        (":7471", None),
        ("", None),
    ],
)
def test_an_address_is_read_or_left_to_others(text: str, parsed: tuple[str, int] | None) -> None:
    assert parse_address(text) == parsed


@given(st.text(max_size=50))
def test_no_text_from_a_peer_breaks_the_reader(text: str) -> None:
    parse_address(text)
    network_of(text)


def test_what_is_written_can_be_read() -> None:
    for host in ("192.0.2.1", "2001:db8::1"):
        assert parse_address(format_address(host, 5)) == (host, 5)


def test_one_subscriber_is_one_network() -> None:
    assert network_of("2001:db8::1") == network_of("2001:db8::ffff")
    assert network_of("2001:db8:0:1::1") != network_of("2001:db8::1")
    assert network_of("::ffff:192.0.2.1") == network_of("192.0.2.1") == "192.0.2.1"
    assert network_of("fe80::1%eth0") == network_of("fe80::2")


def test_loopback_is_known_in_all_its_forms() -> None:
    assert all(is_loopback(network_of(host)) for host in ("127.0.0.1", "::1", "::ffff:127.0.0.1"))
    assert not any(is_loopback(network_of(host)) for host in ("192.0.2.1", "2001:db8::1"))


def test_a_wildcard_is_announced_as_addresses_that_can_be_dialled() -> None:
    assert reachable_hosts("192.0.2.7") == ["192.0.2.7"]
    for wildcard in WILDCARDS:
        hosts = reachable_hosts(wildcard)
        assert hosts
        assert wildcard not in hosts
