"""Three real node processes and the real openai client."""

from __future__ import annotations

import itertools
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from .live import LiveNode, live_mesh, model_is_ready, wait_for

pytestmark = pytest.mark.e2e

PROMPT = "def fibonacci(n):"


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[LiveNode]]:
    with live_mesh(tmp_path_factory.mktemp("mesh"), ["0:3", "3:6", "6:8"]) as nodes:
        yield nodes


def client_of(node: LiveNode) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{node.api}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture
def client(mesh: list[LiveNode]) -> Iterator[openai.OpenAI]:
    with client_of(mesh[0]) as opened:
        yield opened


def complete(client: openai.OpenAI, tokens: int = 48) -> str:
    answer = client.completions.create(
        model="shoal-tiny", prompt=PROMPT, max_tokens=tokens, temperature=0
    )
    return answer.choices[0].text


def pages_in_use(nodes: list[LiveNode]) -> float:
    return sum(stage["pages_used"] for node in nodes for stage in node.status()["stages"])


def test_a_completion_is_the_same_through_every_gateway(mesh: list[LiveNode]) -> None:
    texts = set()
    for node in mesh:
        with client_of(node) as client:
            texts.add(complete(client))
    assert len(texts) == 1
    assert texts.pop().strip()


def test_streaming_gives_the_text_of_the_whole_answer_and_the_usage(client: openai.OpenAI) -> None:
    whole = complete(client)
    stream = client.completions.create(
        model="shoal-tiny",
        prompt=PROMPT,
        max_tokens=48,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.completion_tokens <= 48
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_chat_with_seed_and_logprobs_is_repeatable(client: openai.OpenAI) -> None:
    def ask() -> openai.types.chat.ChatCompletion:
        return client.chat.completions.create(
            model="shoal-tiny",
            messages=[{"role": "user", "content": "import os"}],
            max_tokens=16,
            seed=7,
            temperature=0.8,
            logprobs=True,
            top_logprobs=3,
            n=2,
        )

    first, second = ask(), ask()
    assert [c.message.content for c in first.choices] == [c.message.content for c in second.choices]
    for choice in first.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content
        assert all(len(token.top_logprobs) == 3 for token in choice.logprobs.content)


def test_errors_are_those_of_openai(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="shoal-tiny"):
        client.completions.create(model="no-such-model", prompt="x")
    with pytest.raises(openai.BadRequestError, match="1024"):
        client.completions.create(model="shoal-tiny", prompt="word " * 3000, max_tokens=5)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="shoal-tiny", prompt="x", temperature=-1)


def test_a_client_that_leaves_frees_the_pages_everywhere(
    mesh: list[LiveNode], client: openai.OpenAI
) -> None:
    stream = client.completions.create(
        model="shoal-tiny",
        prompt=PROMPT,
        max_tokens=900,
        stream=True,
        temperature=1,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    assert pages_in_use(mesh) > 0
    stream.close()
    wait_for("all pages are free", lambda: pages_in_use(mesh) == 0, 10)


def test_many_sessions_at_once_each_get_their_own_text(
    mesh: list[LiveNode], client: openai.OpenAI
) -> None:
    whole = complete(client)
    answers: list[str] = []
    threads = [threading.Thread(target=lambda: answers.append(complete(client))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [whole] * 8
    wait_for("all pages are free", lambda: pages_in_use(mesh) == 0, 10)


def test_garbage_on_the_transport_port_is_dropped_and_counted(
    mesh: list[LiveNode], client: openai.OpenAI
) -> None:
    victim = mesh[1]
    whole = complete(client)
    host, _, port = victim.status()["addresses"][0].rpartition(":")
    for garbage in (b"\x00" * 100, b"GET / HTTP/1.1\r\n\r\n", bytes(range(256)) * 40):
        with socket.create_connection((host, int(port)), timeout=5) as raw:
            raw.sendall(garbage)
            raw.shutdown(socket.SHUT_WR)
    assert complete(client) == whole
    assert victim.process.poll() is None
    metrics = httpx.get(f"{victim.api}/metrics").text
    assert "shoal_peer_faults_total" in metrics


def test_metrics_and_health(mesh: list[LiveNode], client: openai.OpenAI) -> None:
    complete(client, 4)
    assert httpx.get(f"{mesh[0].api}/health").json() == {"status": "ok"}
    metrics = httpx.get(f"{mesh[0].api}/metrics").text
    for name in (
        "shoal_generation_tokens_total",
        "shoal_time_to_first_token_seconds",
        "shoal_kv_cache_usage_perc",
    ):
        assert name in metrics


def test_an_idle_node_uses_less_than_two_percent_of_a_core(mesh: list[LiveNode]) -> None:
    import psutil

    processes = [psutil.Process(node.process.pid) for node in mesh]

    def busy_s() -> list[float]:
        return [sum(process.cpu_times()[:2]) for process in processes]

    before, started = busy_s(), time.monotonic()
    time.sleep(6)
    took = time.monotonic() - started
    shares = [(after - earlier) / took for after, earlier in zip(busy_s(), before, strict=True)]
    assert max(shares) < 0.02, shares


def stream_text(node: LiveNode, tokens: int, on_chunk=lambda count: None) -> str:
    """Greedy text of `tokens` tokens; `on_chunk` is called with the number of chunks so far."""
    text, count = "", 0
    with client_of(node) as client:
        for chunk in client.completions.create(
            model="shoal-tiny",
            prompt=PROMPT,
            max_tokens=tokens,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        ):
            text += chunk.choices[0].text if chunk.choices else ""
            count += 1
            on_chunk(count)
    return text


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_stage_may_die_in_mid_stream_and_nobody_notices(
    tmp_path: Path, how: signal.Signals
) -> None:
    """In the exact class: a replacement computes many tokens at once where the dead stage computed
    one at a time, and float products of other heights round otherwise.
    """
    with live_mesh(tmp_path, ["0:3", "3:6", "6:8", "3:6"], "--quant", "int8") as nodes:
        undisturbed = stream_text(nodes[0], 400)

        def kill_the_one_in_use(count: int) -> None:
            if count == 30:
                busy = [n for n in (nodes[1], nodes[3]) if n.status()["stages"][0]["sessions"]]
                assert len(busy) == 1
                busy[0].process.send_signal(how)

        assert stream_text(nodes[0], 400, kill_the_one_in_use) == undisturbed


def test_without_a_spare_there_is_an_explicit_error_within_three_seconds(tmp_path: Path) -> None:
    with live_mesh(tmp_path, ["0:3", "3:6", "6:8"]) as nodes:
        killed_at = 0.0

        def kill(count: int) -> None:
            nonlocal killed_at
            if count == 20:
                nodes[1].kill()
                killed_at = time.monotonic()

        with pytest.raises(openai.APIError, match="nobody holds layers 3"):
            stream_text(nodes[0], 900, kill)
        assert time.monotonic() - killed_at < 3
        with client_of(nodes[0]) as client, pytest.raises(openai.APIStatusError) as refused:
            complete(client)
        assert refused.value.status_code == 503


def test_a_private_mesh_answers_its_members_and_a_planned_leave_is_quiet(tmp_path: Path) -> None:
    with live_mesh(tmp_path, ["0:8"], "--private") as nodes:
        assert nodes[0].status()["mesh"]["private"]
        with client_of(nodes[0]) as client:
            assert complete(client)
        assert nodes[0].leave() == 0


def test_a_planned_leave_shows_no_gap_in_the_streams_of_others(tmp_path: Path) -> None:
    """The one in use is asked to leave in mid-stream: what it computes is handed over first."""
    with live_mesh(tmp_path, ["0:3", "3:6", "6:8", "3:6"], "--quant", "int8") as nodes:
        undisturbed = stream_text(nodes[0], 300)
        left: list[LiveNode] = []
        came: list[float] = []

        def ask_the_one_in_use_to_leave(count: int) -> None:
            came.append(time.monotonic())
            if count == 30:
                busy = [n for n in (nodes[1], nodes[3]) if n.status()["stages"][0]["sessions"]]
                left.extend(busy)
                busy[0].process.send_signal(signal.SIGTERM)

        assert stream_text(nodes[0], 300, ask_the_one_in_use_to_leave) == undisturbed
        assert left[0].process.wait(timeout=30) == 0
        longest = max(after - before for before, after in itertools.pairwise(came))
        assert longest < 2, f"a gap of {longest:.2f} s"


def test_a_process_that_was_stopped_for_a_while_comes_back(tmp_path: Path) -> None:
    """Ten seconds: the others have given it up by then, and its sessions are nobody's."""
    with live_mesh(tmp_path, ["0:3", "3:6", "6:8"], "--quant", "int8") as nodes:
        undisturbed = stream_text(nodes[0], 60)

        def stop(count: int) -> None:
            if count == 10:
                nodes[1].process.send_signal(signal.SIGSTOP)

        with pytest.raises(openai.APIError):
            stream_text(nodes[0], 300, stop)
        time.sleep(8)
        nodes[1].process.send_signal(signal.SIGCONT)
        wait_for("it is found again", lambda: all(map(model_is_ready, nodes)), 20)
        wait_for("its sessions are freed", lambda: pages_in_use(nodes) == 0, 20)
        assert stream_text(nodes[0], 60) == undisturbed
