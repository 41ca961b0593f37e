"""Which server is there: servers as they describe themselves, without a network."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from shoal.engine.request import Sampling
from shoal.engine.served import BackendAddress, Engine, EngineClient, Job
from shoal.errors import BackendFailed, BadConfig
from shoal.models.checkpoint import BUILTIN_FOLDER
from shoal.models.text import Tokenizer

TOKENIZER = Tokenizer.open(BUILTIN_FOLDER)
JOB = Job(TOKENIZER.encode("def main"), [], Sampling(temperature=0, max_tokens=3))
Handler = Callable[[httpx.Request], httpx.Response]


class FakeServer:
    """Speaks like vLLM; `gives_ids` and `takes_ids` say how well. Says `reply` to everybody."""

    def __init__(self, reply: str, *, owner: str = "vllm", takes_ids: bool = True) -> None:
        self.reply, self.owner, self.takes_ids = reply, owner, takes_ids
        self.gives_ids = True
        self.models = ["org/model"]
        self.asked: list[dict[str, Any]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        match request.url.path:
            case "/v1/models":
                return self._models()
            case "/v1/completions":
                return self._completion(json.loads(request.content))
            case _:
                return httpx.Response(404, json={"error": "no such thing"})

    def _models(self) -> httpx.Response:
        about = {"owned_by": self.owner, "max_model_len": 512}
        return httpx.Response(200, json={"data": [{"id": name, **about} for name in self.models]})

    def _completion(self, body: dict[str, Any]) -> httpx.Response:
        prompt = body["prompt"]
        self.asked.append(body)
        if isinstance(prompt, list) and not self.takes_ids:
            return httpx.Response(500, json={"error": {"message": "a string, please"}})
        ids = prompt if isinstance(prompt, list) else TOKENIZER.encode(prompt)
        choices = [self._choice(id, body) for id in TOKENIZER.encode(self.reply)]
        if not body.get("stream"):
            usage = {"prompt_tokens": len(ids)}
            return httpx.Response(200, json={"choices": choices[:1], "usage": usage})
        events = [{"choices": [choice]} for choice in choices[: body["max_tokens"]]]
        wire = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
        return httpx.Response(200, text=wire + "data: [DONE]\n\n")

    def _choice(self, id: int, body: dict[str, Any]) -> dict[str, Any]:
        choice: dict[str, Any] = {"text": TOKENIZER.token_text(id), "finish_reason": None}
        return choice | (
            {"token_ids": [id]} if self.gives_ids and body.get("return_token_ids") else {}
        )


def client_of(handler: Handler, key: str = "") -> EngineClient:
    address = BackendAddress.parse("http://engine.test:8000/v1", key)
    return EngineClient(address, transport=httpx.MockTransport(handler))


async def asked(handler: Handler, names: tuple[str, ...] = ("org/model",)) -> tuple[str, str, int]:
    """Name of what was found, text of its answer, its context."""
    async with client_of(handler) as client:
        engine = Engine(client, TOKENIZER, names)
        probed = await engine.probe()
        tokens = [one async for some in engine.generate(JOB) for one in some]
        return engine.name, TOKENIZER.decode([one.token for one in tokens]), probed.context


@pytest.mark.anyio
async def test_vllm_is_spoken_to_in_ids() -> None:
    server = FakeServer("(x, y, z)")
    name, text, context = await asked(server)
    assert (name, context) == ("vLLM, token ids", 512)
    assert text == TOKENIZER.decode(TOKENIZER.encode("(x, y, z)")[:3])
    assert server.asked[-1]["prompt"] == list(JOB.prompt_ids)


@pytest.mark.anyio
async def test_a_server_that_shows_no_ids_is_given_ids_and_read_as_text() -> None:
    server = FakeServer("(x, y, z)", owner="sglang")
    server.gives_ids = False
    name, text, _ = await asked(server)
    assert name == "SGLang, token ids in, text out"
    assert text == TOKENIZER.decode(TOKENIZER.encode("(x, y, z)")[:3])
    assert server.asked[-1]["prompt"] == list(JOB.prompt_ids)


@pytest.mark.anyio
async def test_a_server_of_text_alone_is_given_text() -> None:
    server = FakeServer("(x, y, z)", owner="somebody", takes_ids=False)
    name, text, _ = await asked(server)
    assert name == "OpenAI-compatible server, text"
    assert text == TOKENIZER.decode(TOKENIZER.encode("(x, y, z)")[:3])
    assert server.asked[-1]["prompt"] == "def main"


@pytest.mark.anyio
async def test_of_several_models_the_one_of_our_name_is_meant() -> None:
    server = FakeServer("(x, y, z)")
    server.models = ["other", "org/model"]
    await asked(server)
    assert server.asked[-1]["model"] == "org/model"
    server.models = ["other", "another"]
    with pytest.raises(BadConfig, match="other, another"):
        await asked(server)


@pytest.mark.anyio
async def test_one_model_alone_is_taken_under_any_name() -> None:
    server = FakeServer("(x, y, z)")
    await asked(server, ("called-differently-here",))
    assert server.asked[-1]["model"] == "org/model"


@pytest.mark.anyio
async def test_a_name_that_was_given_must_be_there() -> None:
    async with client_of(FakeServer("x")) as client:
        with pytest.raises(BadConfig, match="org/model"):
            await Engine(client, TOKENIZER, ("another",), exactly=True).probe()


@pytest.mark.anyio
async def test_a_redirect_is_not_followed() -> None:
    visited = []

    def moved(request: httpx.Request) -> httpx.Response:
        visited.append(request.url.host)
        return httpx.Response(307, headers={"location": "http://elsewhere.test/v1/models"})

    with pytest.raises(BadConfig, match="redirect"):
        await asked(moved)
    assert set(visited) == {"engine.test"}


@pytest.mark.anyio
@pytest.mark.parametrize("status", [500, 502, 503, 429])
async def test_an_engine_that_is_not_well_is_waited_for(status: int) -> None:
    with pytest.raises(BackendFailed):
        await asked(lambda _: httpx.Response(status))


@pytest.mark.anyio
async def test_a_refused_key_is_not_waited_for() -> None:
    with pytest.raises(BadConfig, match="key"):
        await asked(lambda _: httpx.Response(401))


@pytest.mark.anyio
async def test_the_key_is_sent_and_shown_nowhere() -> None:
    seen = []

    def broken(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers["authorization"])
        raise httpx.ConnectError("cannot connect to http://engine.test:8000 with secret-key")

    client = client_of(broken, "secret-key")
    with pytest.raises(BackendFailed) as told:
        await client.ask("v1/models")
    assert seen == ["Bearer secret-key"]
    assert "secret" not in str(told.value)
    assert "engine.test" not in str(told.value)
    assert "secret" not in repr(BackendAddress.parse("http://x.test", "secret-key"))
    await client.__aexit__()


@pytest.mark.anyio
async def test_an_endless_answer_is_given_up() -> None:
    with pytest.raises(BackendFailed, match="bytes"):
        await asked(lambda _: httpx.Response(200, content=b" " * (9 << 20)))


@pytest.mark.anyio
async def test_an_answer_that_breaks_off_is_a_failure() -> None:
    server = FakeServer("")
    async with client_of(server) as client:
        engine = Engine(client, TOKENIZER, ())
        server.reply = "x"
        await engine.probe()
        server.reply = ""
        with pytest.raises(BackendFailed, match="broke off"):
            [some async for some in engine.generate(JOB)]


@pytest.mark.parametrize(
    "url",
    [
        "ftp://h",
        "127.0.0.1:80",
        "http://",
        "http://u:p@h",
        "http://h/?x=1",
        "file:///etc",
        "http://a\x00b",
        "http://[::1",
        "",
        "http://h:x",
    ],
)
def test_only_plain_http_urls_are_taken(url: str) -> None:
    with pytest.raises(BadConfig, match="--backend"):
        BackendAddress.parse(url)


def test_the_v1_may_be_written_or_not() -> None:
    both = {BackendAddress.parse(f"http://h:1/{path}").url for path in ("", "v1", "v1/")}
    assert both == {"http://h:1/"}
