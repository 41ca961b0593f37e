"""Against real servers: llama.cpp's, with ids both ways, and llama-cpp-python's, with text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from shoal.engine.request import Grammar, Sampled, Sampling
from shoal.engine.served import BackendAddress, Engine, EngineClient, Job
from shoal.errors import BadConfig
from shoal.models.checkpoint import BUILTIN_FOLDER
from shoal.models.text import Tokenizer
from tests.llama_servers import llama_python_server, llama_server
from tests.needs import needs

PROMPT = "def main():\n"
TOKENS = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs("gguf")
    from tests.gguf_files import write_gguf

    return write_gguf(BUILTIN_FOLDER, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def llama(model: Path) -> Iterator[str]:
    with llama_server(model) as url:
        yield url


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.open(BUILTIN_FOLDER)


def job(tokenizer: Tokenizer, output: list[int] | None = None, **settings: object) -> Job:
    asked = {"temperature": 0.0, "max_tokens": TOKENS, **settings}
    return Job(tokenizer.encode(PROMPT), output or [], Sampling(**asked))  # type: ignore[arg-type]


async def answer(url: str, tokenizer: Tokenizer, work: Job) -> tuple[str, list[Sampled]]:
    async with EngineClient(BackendAddress.parse(url)) as client:
        engine = Engine(client, tokenizer, ["tiny.gguf"])
        await engine.probe()
        assert engine.refuses(work.sampling) == ""
        return engine.name, [one async for some in engine.generate(work) for one in some]


def ids_of(answered: list[Sampled]) -> list[int]:
    return [sampled.token for sampled in answered]


@pytest.mark.anyio
async def test_llama_server_is_spoken_to_in_ids_and_writes_what_it_would_by_itself(
    llama: str, tokenizer: Tokenizer
) -> None:
    work = job(tokenizer)
    name, got = await answer(llama, tokenizer, work)
    body = {"prompt": work.ids, "n_predict": TOKENS, "temperature": 0, "return_tokens": True}
    async with httpx.AsyncClient(trust_env=False) as http:
        own = (await http.post(f"{llama}/completion", json=body, timeout=30)).json()
    assert name == "llama.cpp server, token ids"
    assert ids_of(got) == own["tokens"]
    assert [one.finish for one in got] == [""] * (TOKENS - 1) + ["length"]


@pytest.mark.anyio
async def test_an_answer_that_another_route_began_goes_on_alike(
    llama: str, tokenizer: Tokenizer
) -> None:
    _, whole = await answer(llama, tokenizer, job(tokenizer))
    _, rest = await answer(llama, tokenizer, job(tokenizer, ids_of(whole[:10])))
    assert ids_of(rest) == ids_of(whole[10:])


@pytest.mark.anyio
async def test_a_stop_id_ends_the_answer_and_logprobs_are_told(
    llama: str, tokenizer: Tokenizer
) -> None:
    _, whole = await answer(llama, tokenizer, job(tokenizer))
    stop = whole[5].token
    at = ids_of(whole).index(stop)
    _, cut = await answer(llama, tokenizer, job(tokenizer, stop_ids=(stop,), logprobs=2))
    assert ids_of(cut) == ids_of(whole[: at + 1])
    assert cut[-1].finish == "stop"
    assert all(one.logprob is not None and one.logprob <= 0 for one in cut)
    assert [one.top[0].token for one in cut] == ids_of(cut)


@pytest.mark.anyio
async def test_characters_cut_over_tokens_come_out_whole(llama: str, tokenizer: Tokenizer) -> None:
    """The server tells only the last token of such a character."""
    euro = tokenizer.encode("€")
    bias = dict.fromkeys(euro, 100.0)
    _, got = await answer(llama, tokenizer, job(tokenizer, logit_bias=bias, max_tokens=9, seed=5))
    async with httpx.AsyncClient(trust_env=False) as http:
        body = {"prompt": job(tokenizer).ids, "n_predict": 9, "temperature": 0}
        body |= {"logit_bias": [[id, 100.0] for id in euro], "samplers": ["temperature"]}
        own = (await http.post(f"{llama}/completion", json=body, timeout=30)).json()
    assert len(euro) == 3
    assert tokenizer.decode(ids_of(got)).rstrip("\ufffd") == own["content"].rstrip("\ufffd")


@pytest.mark.anyio
async def test_llama_server_is_held_to_a_schema(llama: str, tokenizer: Tokenizer) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    schema["additionalProperties"] = False
    asked = Grammar("json_schema", json.dumps(schema))
    _, got = await answer(llama, tokenizer, job(tokenizer, grammar=asked, stop_ids=(0,)))
    assert json.loads(tokenizer.decode(ids_of(got))).keys() == {"a"}
    assert got[-1].finish == "stop"


@pytest.mark.anyio
async def test_closing_the_stream_frees_the_slot(llama: str, tokenizer: Tokenizer) -> None:
    """Two slots: a third answer comes only because the first two were given up."""
    async with EngineClient(BackendAddress.parse(llama)) as client:
        engine = Engine(client, tokenizer, [])
        assert (await engine.probe()).slots == 2
        long = job(tokenizer, max_tokens=900)
        for _ in range(2):
            stream = engine.generate(long)
            await anext(stream)
            await stream.aclose()
        assert [s async for some in engine.generate(job(tokenizer)) for s in some][-1].finish


@pytest.mark.anyio
async def test_a_server_of_text_only_gives_the_same_text(
    model: Path, llama: str, tokenizer: Tokenizer
) -> None:
    _, by_ids = await answer(llama, tokenizer, job(tokenizer))
    with llama_python_server(model) as url:
        name, by_text = await answer(url, tokenizer, job(tokenizer))
    assert name == "llama-cpp-python, text"
    assert by_text[-1].finish == "length"
    assert tokenizer.decode(ids_of(by_text)) == tokenizer.decode(ids_of(by_ids))


@pytest.mark.anyio
async def test_another_models_tokenizer_is_noticed(llama: str, tmp_path: Path) -> None:
    known = json.loads((BUILTIN_FOLDER / "tokenizer.json").read_text())
    vocabulary = known["model"]["vocab"]
    for token in vocabulary:
        vocabulary[token] = len(vocabulary) - vocabulary[token] if vocabulary[token] else 0
    (tmp_path / "tokenizer.json").write_text(json.dumps(known))
    other = Tokenizer.open(tmp_path)
    async with EngineClient(BackendAddress.parse(llama)) as client:
        with pytest.raises(BadConfig, match="another tokenizer"):
            await Engine(client, other, []).probe()
