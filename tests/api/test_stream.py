from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

import pytest

from shoal.api.stream import EventStream


@pytest.mark.anyio
async def test_a_stream_that_has_much_to_say_lets_others_have_their_turn() -> None:
    said: list[str] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        """Never waits: the client reads as fast as we write."""

    async def write(name: str) -> None:
        stream = EventStream(send)
        for _ in range(3):
            await stream.write(b"data: word\n\n")
            said.append(name)

    await asyncio.gather(write("a"), write("b"))
    assert said == ["a", "b"] * 3
