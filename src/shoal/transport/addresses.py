"""Addresses as text: ``host:port`` or ``[v6]:port``."""

from __future__ import annotations

import ipaddress
import socket

import psutil

WILDCARDS = ("", "0.0.0.0", "::")  # noqa: S104  compared with, never bound by itself


def format_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_address(text: str) -> tuple[str, int] | None:
    """Host and port, or None when the text belongs to another carrier or to nobody."""
    host, _, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        return None
    if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port[:6]) < 1 << 16:
        return None
    return host, int(port)


def network_of(host: str) -> str:
    """What one subscriber can easily change addresses within: an IPv4 address, an IPv6 /64."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


def is_loopback(network: str) -> bool:
    return network.startswith("127.") or network == str(ipaddress.ip_network("::/64"))


def reachable_hosts(bound: str) -> list[str]:
    """The hosts under which a socket bound to `bound` can be dialled, best first.

    A wildcard stands for the machine's own addresses, or for loopback when it has no other.
    """
    if bound not in WILDCARDS:
        return [bound]
    families = (socket.AF_INET, socket.AF_INET6) if bound != "0.0.0.0" else (socket.AF_INET,)  # noqa: S104
    found = [
        address.address
        for family in families
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family == family and _is_public_enough(address.address)
    ]
    return found or ["127.0.0.1"]


def _is_public_enough(host: str) -> bool:
    address = ipaddress.ip_address(host.partition("%")[0])
    return not (address.is_loopback or address.is_link_local or address.is_unspecified)
