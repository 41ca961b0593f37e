"""Clients that do what clients do: ask for this and that, wait, and leave. Drawn from a seed.

Knows: the HTTP interface as any client does, and what a whole answer looks like.
Does not know: nodes, pages, what a benchmark makes of it.
"""

from __future__ import annotations

import asyncio
import json
import random
import textwrap
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

MODEL = "shoal-tiny"
PATIENCE_S = 120.0  # a request that takes longer hangs
TEXT = Path(textwrap.__file__).read_text()
STOPS = ("\n\n", "return", "self", ":", "zebra")

WHOLE = {"stop", "length"}  # finish reasons of an answer that lacks nothing

Body = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Ask:
    """One request, and when its client loses interest: after so many events, or so much time."""

    body: Body
    events: int | None = None
    seconds: float | None = None
    known: str = ""  # the name of an answer that must come out the same each time

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if "messages" in self.body else "/v1/completions"


@dataclass(slots=True)
class Ending:
    """What became of a request. `how` is its finish reason, "left", or begins with one of refused
    (a status and a code), error (in the stream), broken (no end, or a wrong one) and hangs.
    """

    how: str = ""
    known: str = ""
    texts: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    first_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        return set(self.how.split(" and ")) <= WHOLE


def known_asks() -> dict[str, Body]:
    """Requests that have one right answer: greedy ones, and one that is drawn from a seed."""
    function = TEXT[TEXT.index("def dedent") :][:600]
    sampled = {"prompt": TEXT[:500], "max_tokens": 48, "temperature": 0.9, "seed": 11}
    json_object: Body = {"type": "json_object"}
    chat = {"messages": [{"role": "user", "content": "{"}], "response_format": json_object}
    greedy: dict[str, Body] = {
        "short": {"prompt": "import os\n", "max_tokens": 64},
        "long": {"prompt": TEXT[:1500], "max_tokens": 32},
        "repeating": {"prompt": 2 * function, "max_tokens": 96},
        "two choices": {"prompt": "class Reader:\n", "max_tokens": 24, "n": 2},
        "json": {**chat, "max_tokens": 40},
    }
    return {"sampled": sampled} | {name: {**b, "temperature": 0} for name, b in greedy.items()}


def draw(chance: random.Random) -> Ask:
    """Anything: one in eight has a known answer, one in four is left before its end."""
    if chance.random() < 1 / 8:
        return _known(chance)
    body = _json_body(chance) if chance.random() < 1 / 10 else _text_body(chance)
    leaves = chance.random()
    if leaves < 1 / 8:
        return Ask(body, events=chance.randint(1, 40))
    if leaves < 1 / 4:
        return Ask(body, seconds=chance.uniform(0, 0.3))  # often before the first token
    return Ask(body)


def _known(chance: random.Random) -> Ask:
    name = chance.choice(sorted(known_asks()))
    return Ask(known_asks()[name], known=name)


def _text_body(chance: random.Random) -> Body:
    body = {"prompt": _prompt(chance), **_settings(chance)}
    if chance.random() < 1 / 3:
        body["stop"] = chance.sample(STOPS, chance.randint(1, 3))
    if chance.random() < 1 / 10:
        body["n"] = chance.randint(2, 3)
    return body


def _json_body(chance: random.Random) -> Body:
    message = {"role": "user", "content": _prompt(chance)}
    wanted = {"type": "json_object"}
    return {"messages": [message], "response_format": wanted, **_settings(chance)}


def _prompt(chance: random.Random) -> str:
    """Up to some 500 tokens; every second one begins like others do."""
    start = 0 if chance.random() < 0.5 else chance.randrange(len(TEXT) - 2000)
    return TEXT[start : start + chance.choice([5, 50, 300, 1500]) + chance.randrange(50)]


def _settings(chance: random.Random) -> Body:
    most = chance.choice([1, 8, 32, 64, 128, 200])
    return {"max_tokens": most, "temperature": chance.choice([0, 0, 0.7, 1, 1.5])}


async def client(
    chance: random.Random, apis: Sequence[str], until: float, endings: list[Ending]
) -> None:
    """Ask one thing after the other, through any node, until that time (of `time.monotonic`).

    The first has a known answer, so that the shortest run repeats some.
    """
    wanted = _known(chance)
    async with httpx.AsyncClient(timeout=None) as http:  # noqa: S113 - PATIENCE_S is the limit
        while time.monotonic() < until:
            endings.append(await ask(http, chance.choice(apis), wanted))
            wanted = draw(chance)


async def ask(http: httpx.AsyncClient, api: str, wanted: Ask) -> Ending:
    """Never raises for what the other side does."""
    ending = Ending(known=wanted.known)
    try:
        async with asyncio.timeout(wanted.seconds or PATIENCE_S):
            ending.how = await _stream(http, api, wanted, ending)
    except TimeoutError:
        ending.how = "left" if wanted.seconds else "hangs"
    except httpx.HTTPError as error:
        ending.how = f"broken: {error!r}"
    return ending


async def _stream(http: httpx.AsyncClient, api: str, wanted: Ask, ending: Ending) -> str:
    came: dict[int, list[float]] = {}
    started = time.perf_counter()
    body = {"model": MODEL, "stream": True, **wanted.body}
    async with http.stream("POST", f"{api}{wanted.path}", json=body) as response:
        if response.status_code != 200:
            error = json.loads(await response.aread())["error"]
            return f"refused: {response.status_code} {error['code']}"
        try:
            async with aclosing(_events(response)) as events:
                return await _follow(events, wanted, ending, came)
        finally:
            firsts = [times[0] - started for times in came.values()]
            ending.first_s = min(firsts, default=None)
            ending.gaps_s = [b - a for times in came.values() for a, b in pairwise(times)]


async def _events(response: httpx.Response) -> AsyncGenerator[str, None]:
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            yield line.removeprefix("data: ")


async def _follow(
    events: AsyncIterator[str], wanted: Ask, ending: Ending, came: dict[int, list[float]]
) -> str:
    count = 0
    async for event in events:
        if event == "[DONE]":
            return _verdict(wanted, ending)
        data = json.loads(event)
        if "error" in data:
            return f"error: {data['error']['code']}"
        for choice in data["choices"]:
            _take(choice, ending, came)
        count += 1
        if count == wanted.events:
            return "left"
    return "broken: the stream ended without [DONE]"


def _take(choice: Body, ending: Ending, came: dict[int, list[float]]) -> None:
    index = choice["index"]
    text = choice.get("text") or choice.get("delta", {}).get("content") or ""
    if text:
        came.setdefault(index, []).append(time.perf_counter())
        ending.texts[index] = ending.texts.get(index, "") + text
    if choice["finish_reason"]:
        if index in ending.reasons:
            ending.reasons[index] = "twice"
        else:
            ending.reasons[index] = choice["finish_reason"]


def _verdict(wanted: Ask, ending: Ending) -> str:
    """What [DONE] is worth: each choice must have ended, once, as it was asked to."""
    choices = range(wanted.body.get("n", 1))
    reasons = {ending.reasons.get(index, "none") for index in choices}
    if not reasons <= WHOLE:
        return f"broken: reasons {sorted(reasons)}"
    stops = wanted.body.get("stop", ())
    if any(stop in text for stop in stops for text in ending.texts.values()):
        return "broken: a stop string in the text"
    if "response_format" in wanted.body and reasons == {"stop"}:
        try:
            json.loads(ending.texts.get(0, ""))
        except ValueError:
            return "broken: no JSON"
    return " and ".join(sorted(reasons))
