from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
from openai import AsyncOpenAI

from shoal.api import ApiConfig, ApiServer, create_app

from .stub import StubBackend


@pytest.fixture
def backend() -> StubBackend:
    return StubBackend()


@pytest.fixture
def config() -> ApiConfig:
    return ApiConfig(heartbeat_s=0.05)


@pytest.fixture
async def server(
    anyio_backend: str, backend: StubBackend, config: ApiConfig
) -> AsyncIterator[ApiServer]:
    app = create_app(backend, config, lambda: b"shoal_nodes 3.0\n")
    async with ApiServer(app, port=0) as server:
        yield server


@pytest.fixture
async def openai(server: ApiServer) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def wire(server: ApiServer) -> AsyncIterator[httpx.AsyncClient]:
    """Plain HTTP over a real socket."""
    async with httpx.AsyncClient(base_url=server.url) as client:
        yield client


@pytest.fixture
async def http(
    anyio_backend: str, backend: StubBackend, config: ApiConfig
) -> AsyncIterator[httpx.AsyncClient]:
    """Plain HTTP into the app, without a socket: answers come whole."""
    inside = httpx.ASGITransport(create_app(backend, config, bytes))
    async with httpx.AsyncClient(base_url="http://127.0.0.1", transport=inside) as client:
        yield client
