"""What may be set about the front door."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from ..errors import BadConfig

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(kw_only=True, frozen=True, slots=True)
class ApiConfig:
    api_key: str | None = None  # asked for as `Authorization: Bearer KEY`
    allowed_hosts: tuple[str, ...] = LOOPBACK_NAMES  # names a Host header may carry; empty = any
    max_body_bytes: int = 4 << 20
    body_timeout_s: float = 30.0  # a body must have arrived by then
    default_max_tokens: int = 1024
    max_choices: int = 128  # sequences of one HTTP request: prompts times n
    heartbeat_s: float = 10.0  # a silent event stream gets a comment this often
    per_turn: int = (
        4  # requests begun in one turn of the event loop, all streams getting a go between
    )
    thread_characters: int = 16384  # longer prompts are tokenised off the event loop


def config_for_bind(host: str, api_key: str | None = None) -> ApiConfig:
    """The settings that are safe for listening on `host`.

    On loopback only loopback names are served, since a web page can reach 127.0.0.1 by rebinding
    its own name. Elsewhere anyone may knock, so a key is a must: raises BadConfig without one.
    """
    if is_loopback(host):
        return ApiConfig(api_key=api_key or None)
    if not api_key:
        raise BadConfig(
            f"the API would listen on {host}, where other machines reach it, without a key",
            hint="set SHOAL_API_KEY to a secret of your choice, or keep --host 127.0.0.1",
        )
    return ApiConfig(api_key=api_key, allowed_hosts=())


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
