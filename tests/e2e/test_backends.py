"""Real node processes around llama.cpp: its server behind `--backend`, and a GGUF file in two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from shoal.models.checkpoint import BUILTIN_FOLDER
from tests.llama_servers import free_port, llama_server
from tests.needs import needs

from .live import LiveNode, live_mesh, model_is_ready, ready_line, start_node, wait_for

pytestmark = pytest.mark.e2e

PROMPT = "def main():\n"
TOKENS = 24
LONG = 900


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs("gguf")
    from tests.gguf_files import write_gguf

    return write_gguf(BUILTIN_FOLDER, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@contextmanager
def nodes_of(folder: Path, *options: list[str]) -> Iterator[list[LiveNode]]:
    """Nodes with these options, in one mesh; ready or not."""
    relay_port, nodes = free_port(), []
    try:
        for number, own in enumerate(options):
            home = folder / f"node{number}"
            relay = ["--relay", f"ws://127.0.0.1:{relay_port}"] if number else []
            relay = relay or ["--relay-port", str(relay_port)]
            nodes.append(LiveNode(start_node(home, *relay, *own), home, "", {}))
        for node in nodes:
            node.ready = wait_for("a node", lambda node=node: ready_line(node.process, node.home))
        yield nodes
    finally:
        for node in nodes:
            node.process.kill()
            node.process.wait()


def ask(node: LiveNode, model: str, tokens: int, on_chunk: Callable[[int], None] | None = None):
    """Greedy text, streamed, and how many pieces it came in."""
    text, count = "", 0
    client = openai.OpenAI(base_url=f"{node.api}/v1", api_key="none", max_retries=0)
    with (
        client,
        client.completions.create(
            model=model,
            prompt=PROMPT,
            max_tokens=tokens,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
            stream_options={"include_usage": True},
        ) as chunks,
    ):
        for chunk in chunks:
            if chunk.usage is not None:
                return text, chunk.usage.completion_tokens
            text += chunk.choices[0].text
            count += 1
            if on_chunk:
                on_chunk(count)
    raise AssertionError("no usage came")


def own_text(url: str, tokens: int) -> str:
    """What the server writes when nobody stands before it."""
    body = {"prompt": PROMPT, "n_predict": tokens, "temperature": 0, "ignore_eos": True}
    return httpx.post(f"{url}/completion", json=body, timeout=30, trust_env=False).json()["content"]


def state_of(node: LiveNode) -> str:
    stages = node.status()["stages"]
    return stages[0]["state"] if stages else "none"


def test_a_fronted_server_answers_goes_away_and_comes_back(tmp_path: Path, model: Path) -> None:
    port = free_port()
    options = ["--model", "shoal-tiny", "--backend", f"http://127.0.0.1:{port}/v1"]
    with nodes_of(tmp_path, options) as (node,):
        with llama_server(model, port) as url:  # started after the node, which waits for it
            wait_for("it is served", lambda: model_is_ready(node))
            (stage,) = node.status()["stages"]
            assert stage["backend"] == "llama.cpp server, token ids"
            assert (stage["compute"], stage["layers"]) == ("served", "0:8")
            expected = own_text(url, TOKENS), TOKENS
            with ThreadPoolExecutor(6) as many:  # three times as many as it has slots: they queue
                answers = many.map(lambda _: ask(node, "shoal-tiny", TOKENS), range(6))
                assert [*answers] == [expected] * 6
        wait_for("its end is noticed", lambda: state_of(node) == "draining")
        with pytest.raises(openai.APIStatusError) as refused:
            ask(node, "shoal-tiny", TOKENS)
        assert refused.value.status_code == 503
        with llama_server(model, port) as url:
            wait_for("it is back", lambda: state_of(node) == "serving")
            assert ask(node, "shoal-tiny", TOKENS) == (own_text(url, TOKENS), TOKENS)
        shown = node.stderr() + (node.home / "stdout").read_text() + str(node.status())
        assert str(port) not in shown


def test_a_server_that_dies_in_mid_stream_is_replaced_by_another(
    tmp_path: Path, model: Path
) -> None:
    with ExitStack() as servers:
        running = [servers.enter_context(ExitStack()) for _ in range(2)]
        urls = [each.enter_context(llama_server(model)) for each in running]
        options = [["--model", "shoal-tiny", "--backend", url] for url in urls]
        with nodes_of(tmp_path, *options, ["--no-serve"]) as (*fronts, gateway):
            wait_for("both are served", lambda: all(state_of(n) == "serving" for n in fronts))
            wait_for("the gateway knows", lambda: model_is_ready(gateway))
            undisturbed, count = ask(gateway, "shoal-tiny", LONG)
            assert count == LONG
            killed = []

            def kill_the_one_in_use(count: int) -> None:
                if count == 5:
                    busy = [n.status()["stages"][0]["sessions"] for n in fronts].index(1)
                    running[busy].close()
                    killed.append(busy)

            text, count = ask(gateway, "shoal-tiny", LONG, kill_the_one_in_use)
            assert killed
            assert count == LONG
            assert text[:100] == undisturbed[:100]


def test_a_gguf_file_is_computed_by_two_nodes(tmp_path: Path, model: Path) -> None:
    needs("llama_cpp")
    with llama_server(model) as url:
        expected = own_text(url, TOKENS)
    with live_mesh(tmp_path, ["0:3", "3:8"], model=str(model)) as nodes:
        for node in nodes:
            assert ask(node, "tiny", TOKENS) == (expected, TOKENS)
        assert {n.status()["stages"][0]["compute"] for n in nodes} == {"gguf"}
