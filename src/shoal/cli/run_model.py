"""`shoal run MODEL [PROMPT]`: one answer, or a conversation, from the node of this machine.

Without a node, one is started inside this process for as long as the command runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from ..errors import InvalidRequest, NotRunning, ShoalError
from .client import NodeClient, connect
from .completions import Tally, lacks_chat_template, stream_answer
from .options import Api, ApiKey, AsJson, Draft, Dtype, Quant
from .output import json_line, note, stream

PROMPT_MARK = ">>> "
LEAVE = ("/bye", "/exit")


class Conversation:
    """Turns prompts into requests: chat when the model knows how, plain continuation when not."""

    def __init__(
        self,
        client: NodeClient,
        model: str,
        options: dict[str, Any],
        *,
        system: str = "",
        raw: bool,
    ) -> None:
        self._client = client
        self._request = {"model": model, **options}
        self._messages = [{"role": "system", "content": system}] if system else []
        self._raw = raw

    def ask(self, prompt: str, show: Callable[[str], None]) -> Tally:
        """Stream the answer through `show`; chat remembers what was said."""
        if not self._raw:
            try:
                return self._chat(prompt, show)
            except ShoalError as error:
                if not lacks_chat_template(error):
                    raise
                note("this model has no chat template: it continues your text")
                self._raw = True
        return self._stream("/v1/completions", {"prompt": prompt}, show)

    def _chat(self, prompt: str, show: Callable[[str], None]) -> Tally:
        messages = [*self._messages, {"role": "user", "content": prompt}]
        tally = self._stream("/v1/chat/completions", {"messages": messages}, show)
        self._messages = [*messages, {"role": "assistant", "content": tally.text}]
        return tally

    def _stream(self, path: str, said: dict[str, Any], show: Callable[[str], None]) -> Tally:
        tally = Tally()
        for piece in stream_answer(self._client, path, {**self._request, **said}):
            tally.add(piece)
            show(piece.text)
        return tally


def run_model(
    model: Annotated[
        str, typer.Argument(help="A model of the mesh, a folder or a Hugging Face id.")
    ],
    prompt: Annotated[
        str | None,
        typer.Argument(help="What to answer; read from stdin, or asked for, if not given."),
    ] = None,
    system: Annotated[str, typer.Option(help="System message of the chat.")] = "",
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text, without chat template.")
    ] = False,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Length of an answer.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0 = likeliest token.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.")] = None,
    dtype: Dtype = None,
    quant: Quant = None,
    draft: Draft = None,
    api: Api = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Ask MODEL: one answer for PROMPT or piped text, else a conversation."""
    prompt = prompt if prompt is not None or sys.stdin.isatty() else sys.stdin.read()
    if prompt is None and as_json:
        raise InvalidRequest("--json wants one PROMPT", hint='shoal run MODEL "PROMPT" --json')
    asked = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    options = {name: value for name, value in asked.items() if value is not None}
    flags = {"dtype": dtype, "quant": quant, "draft": draft}
    with node_for(model, api, api_key, flags) as (client, name):
        conversation = Conversation(client, name, options, system=system, raw=raw)
        if prompt is None:
            converse(conversation)
        elif as_json:
            json_line(as_object(name, conversation.ask(prompt, lambda text: None)))
        else:
            conversation.ask(prompt, stream)
            stream("\n")


def converse(conversation: Conversation) -> None:
    """Prompt after prompt until /bye or the end of input; Ctrl-C cuts an answer short."""
    note(f"{LEAVE[0]} or Ctrl-D ends, Ctrl-C stops an answer", style="dim")
    for prompt in prompts():
        try:
            conversation.ask(prompt, stream)
        except KeyboardInterrupt:
            note(" (stopped)", style="dim")
        stream("\n")


def prompts() -> Iterator[str]:
    while True:
        try:
            line = input(PROMPT_MARK)
        except EOFError:
            return
        if line.strip() in LEAVE:
            return
        if line.strip():
            yield line


def as_object(model: str, tally: Tally) -> dict[str, Any]:
    """The object of --json."""
    return {
        "model": model,
        "text": tally.text,
        "tokens": tally.tokens,
        "finish_reason": tally.finish,
        "tokens_per_second": round(tally.tokens_per_second, 3),
        "ttft_s": round(tally.ttft_s, 4),
    }


@contextmanager
def node_for(
    model: str, api: str | None, api_key: str | None, flags: dict[str, Any]
) -> Iterator[tuple[NodeClient, str]]:
    """The running node and what it calls the model; without one and without --api, one in this
    process that serves it."""
    client = connect(api, api_key)
    if api is not None or is_running(client):
        yield client, model
        return
    note(f"no node runs here: starting one for {model} until this command ends")
    with embedded(model, flags) as own:
        yield own, own.node().stages[0].model_name


def is_running(client: NodeClient) -> bool:
    try:
        client.node()
    except NotRunning:
        return False
    return True


@contextmanager
def embedded(model: str, flags: dict[str, Any]) -> Iterator[NodeClient]:
    """A node in a thread of this process: whole model, no LAN, an API on a free port."""
    from anyio.from_thread import start_blocking_portal

    from ..config import load_settings
    from ..node import Node, node_config

    alone = {"api_port": 0, "lan": False, "listen_host": "127.0.0.1"}
    settings = load_settings({"model": model, **alone, **flags})
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(Node(node_config(settings))) as node,
    ):
        portal.call(node.wait_serving)
        yield NodeClient(node.api_url, settings.api_key)
