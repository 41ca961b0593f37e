"""The mesh as the front door sees it."""

from __future__ import annotations

from typing import Any, cast

import httpx
import pytest
from msgspec.structs import replace

from shoal.api import ApiConfig, create_app
from shoal.models.catalogue import Catalogue
from shoal.node.backend import MeshBackend
from shoal.node.router import Router
from shoal.pipeline import Gateway, Request
from tests.bus.nodes import AMBER, STAGE

pytestmark = pytest.mark.anyio
CHAT = {"model": "shoal-tiny", "messages": [{"role": "user", "content": "Hello"}]}


class Desk:
    """Stands for the gateway: nobody is to come that far."""

    def generate(self, request: Request) -> Any:
        raise AssertionError("a new request was let in")


def client(*, leaving: bool) -> httpx.AsyncClient:
    catalogue = Catalogue()
    checkpoint = catalogue.known("shoal-tiny")
    assert checkpoint is not None
    stage = AMBER.node, replace(STAGE, model=checkpoint.model_id, layers=checkpoint.whole)
    backend = MeshBackend(
        Router(AMBER.node, catalogue, lambda: iter([stage]), frozenset),
        cast(Gateway, Desk()),
        started_at=0,
        is_loading=lambda: False,
        is_leaving=lambda: leaving,
        status=lambda ticket: {},
        mesh=dict,
    )
    inside = httpx.ASGITransport(create_app(backend, ApiConfig(), bytes))
    return httpx.AsyncClient(base_url="http://127.0.0.1", transport=inside)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_gateway_that_leaves_sends_new_requests_to_others(stream: bool) -> None:
    async with client(leaving=True) as http:
        answer = await http.post("/v1/chat/completions", json={**CHAT, "stream": stream})
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "shutting_down"
    assert "another node" in answer.json()["error"]["message"]
    assert "retry-after" in answer.headers


async def test_while_it_stays_they_come_in() -> None:
    async with client(leaving=False) as http:
        with pytest.raises(AssertionError, match="was let in"):
            await http.post("/v1/chat/completions", json=CHAT)
