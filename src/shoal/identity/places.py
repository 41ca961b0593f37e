"""Where something can be reached, as text: relay URLs and host:port addresses, checked."""

from __future__ import annotations

from ipaddress import IPv6Address
from urllib.parse import urlsplit

MAX_URL_CHARS = 256
MAX_ADDRESS_CHARS = 128

_HOST_CHARS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_")


def check_relay_url(url: str) -> str:
    """Return `url` when it is ws://host[:port][/path] or wss://..., else raise ValueError."""
    shown = url[:80]
    if not 0 < len(url) <= MAX_URL_CHARS or not url.isascii() or not url.isprintable():
        raise ValueError(f"not the URL of a relay: {shown!r}")
    parts = urlsplit(url)
    if parts.scheme not in ("ws", "wss") or " " in url or "@" in parts.netloc:
        raise ValueError(f"a relay's URL starts with ws:// or wss://, not {shown!r}")
    _check_host(parts.hostname or "")
    if parts.port == 0:
        raise ValueError(f"no relay listens on port 0: {shown!r}")
    return url


def split_address(address: str) -> tuple[str, int]:
    """``host:port`` or ``[v6]:port`` -> (host, port). Raises ValueError."""
    if len(address) > MAX_ADDRESS_CHARS or not address.isascii():
        raise ValueError(f"not an address: {address[:80]!r}")
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or not 0 < int(port[:6]) < 1 << 16 or len(port) > 5:
        raise ValueError(f"an address is HOST:PORT, not {address[:80]!r}")
    if host.startswith("[") and host.endswith("]"):
        return str(IPv6Address(host[1:-1])), int(port)
    if ":" in host:
        raise ValueError(f"an IPv6 address is written [HOST]:PORT, not {address[:80]!r}")
    _check_host(host)
    return host, int(port)


def _check_host(host: str) -> None:
    if ":" in host:
        IPv6Address(host)
    elif not host or not _HOST_CHARS.issuperset(host):
        raise ValueError(f"not the name of a host: {host[:80]!r}")
