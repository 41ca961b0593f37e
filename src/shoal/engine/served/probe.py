"""Finds out, with a few short questions, which server is there and how it is best spoken to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...errors import BackendFailed, BadConfig
from ...models.text import Tokenizer
from .client import EngineClient
from .dialect import Dialect
from .ids import IdsDialect
from .llama import LlamaDialect
from .retokenise import Retokeniser
from .text import TextDialect

SAMPLE = "The quick brown fox counts: 1, 2, 3 (and so on)."
USUAL_SLOTS = 16
NOT_THERE = (400, 404, 405, 422, 501)  # the server is well, it just has no such thing


@dataclass(frozen=True, slots=True)
class Kind:
    """A server we know: which of our settings it takes beyond OpenAI's, under its own names."""

    name: str
    extra: Mapping[str, str] = field(default_factory=dict)
    no_top_k: int = -1


VLLM_NAMES = {"top_k": "top_k", "min_p": "min_p", "repetition_penalty": "repetition_penalty"}
LLAMA_NAMES = {"top_k": "top_k", "min_p": "min_p", "repetition_penalty": "repeat_penalty"}
LLAMA_SERVER = "llamacpp"
KINDS = {  # by what `/v1/models` says of its owner
    "vllm": Kind("vLLM", VLLM_NAMES),
    "sglang": Kind("SGLang", VLLM_NAMES),
    LLAMA_SERVER: Kind("llama.cpp server", LLAMA_NAMES, 0),
    "me": Kind("llama-cpp-python", LLAMA_NAMES, 0),
}
UNKNOWN = Kind("OpenAI-compatible server")


@dataclass(frozen=True, slots=True)
class Probed:
    """How to speak to it, what it takes at once, how long its context is (0: not told)."""

    dialect: Dialect
    slots: int
    context: int


@dataclass(frozen=True, slots=True)
class _Server:
    """The model of the server that is meant, and the server."""

    model: str
    kind: Kind
    owner: str
    context: int


async def probe(
    client: EngineClient, tokenizer: Tokenizer, names: Sequence[str], *, exactly: bool = False
) -> Probed:
    """`names`: what the model may be called there; unless it is `exactly` so, one model alone is
    taken under any name.

    Raises BackendFailed while it does not answer, BadConfig where waiting will not help.
    """
    server = await _server(client, names, exactly=exactly)
    if server.owner == LLAMA_SERVER:
        return await _llama(client, server, tokenizer)
    if await _speaks_ids(client, server, tokenizer):
        await _check_ids(client, tokenizer, {"model": server.model}, "prompt")
        dialect: Dialect = IdsDialect(server.kind.name, server.model, tokenizer.eos_ids)
    else:
        dialect = await _text(client, server, tokenizer)
    return Probed(dialect, USUAL_SLOTS, server.context)


async def _server(client: EngineClient, names: Sequence[str], *, exactly: bool) -> _Server:
    try:
        listed = (await client.ask("v1/models")).get("data")
    except BackendFailed as error:
        raise _final(error) from None
    models = {str(m.get("id")): m for m in listed or () if isinstance(m, dict)}
    known = [name for name in names if name in models]
    if not known and (exactly or len(models) != 1):
        raise BadConfig(
            f"the engine has no model {names[0]!r}; it has: {', '.join(models)[:300] or 'none'}",
            hint="say which with --backend-model NAME",
        )
    model = known[0] if known else next(iter(models))
    owner = str(models[model].get("owned_by"))
    context = models[model].get("max_model_len")
    kind = KINDS.get(owner, UNKNOWN)
    if owner == "me" and not await _is_llama_python(client):
        kind = UNKNOWN
    return _Server(model, kind, owner, context if type(context) is int else 0)


async def _is_llama_python(client: EngineClient) -> bool:
    told = await _maybe(client, "openapi.json")
    return "llama.cpp Python" in str((told.get("info") or {}).get("title"))


async def _llama(client: EngineClient, server: _Server, tokenizer: Tokenizer) -> Probed:
    """Its own interface, unless it hides that from us."""
    props = await _maybe(client, "props")
    ids = _sample(tokenizer)
    body = {"prompt": ids, "n_predict": 1, "temperature": 0, "return_tokens": True}
    answer = await _maybe(client, "completion", body)
    slots = props.get("total_slots")
    context = (props.get("default_generation_settings") or {}).get("n_ctx")
    if answer.get("tokens"):
        await _check_ids(client, tokenizer, {}, "content")
        dialect: Dialect = LlamaDialect(Retokeniser(tokenizer), tokenizer.eos_ids)
    else:
        dialect = await _text(client, server, tokenizer)
    return Probed(
        dialect,
        slots if type(slots) is int and slots > 0 else USUAL_SLOTS,
        context if type(context) is int else 0,
    )


async def _speaks_ids(client: EngineClient, server: _Server, tokenizer: Tokenizer) -> bool:
    answer = await _complete(client, server, _sample(tokenizer), return_token_ids=True)
    ids = _first_choice(answer).get("token_ids")
    return _counted(answer) == len(_sample(tokenizer)) and bool(ids)


async def _text(client: EngineClient, server: _Server, tokenizer: Tokenizer) -> Dialect:
    _end_id(tokenizer)
    ids = _sample(tokenizer)
    takes_ids = _counted(await _complete(client, server, ids)) == len(ids)
    answer = await _complete(client, server, tokenizer.written(ids))
    if not takes_ids and "text" not in _first_choice(answer):
        raise BadConfig(
            "the engine has no /v1/completions, or refuses a plain prompt there",
            hint="--backend takes vLLM, SGLang, llama.cpp's server and what is compatible",
        )
    return TextDialect(
        server.kind.name,
        server.model,
        tokenizer,
        extra=server.kind.extra,
        no_top_k=server.kind.no_top_k,
        adds_bos=_counted(answer) == len(ids) + 1,
        takes_ids=takes_ids,
    )


def _end_id(tokenizer: Tokenizer) -> int:
    if not tokenizer.eos_ids:
        raise BadConfig(
            "this model's tokenizer names no end-of-text token, which an engine that answers in "
            "text needs",
            hint="name it in generation_config.json (eos_token_id), or take llama.cpp's server",
        )
    return tokenizer.eos_ids[0]


async def _check_ids(
    client: EngineClient, tokenizer: Tokenizer, more: dict[str, Any], field_name: str
) -> None:
    """Ids must mean the same text there. A server that cannot tell is believed."""
    told = (await _maybe(client, "detokenize", {**more, "tokens": _sample(tokenizer)})).get(
        field_name
    )
    if isinstance(told, str) and told.strip() != tokenizer.written(_sample(tokenizer)).strip():
        raise BadConfig(
            "the engine behind --backend has another tokenizer than the model named by --model",
            hint="name the model that the engine serves: its Hugging Face id, folder or GGUF file",
        )


def _sample(tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode(SAMPLE, add_special=False)


async def _complete(
    client: EngineClient, server: _Server, prompt: str | list[int], **more: Any
) -> dict[str, Any]:
    """One greedy token; empty when the engine will not have such a question. (To a prompt of ids
    llama-cpp-python answers 500.)
    """
    body = {"model": server.model, "prompt": prompt, "max_tokens": 1, "temperature": 0, **more}
    refusals = NOT_THERE if isinstance(prompt, str) else (*NOT_THERE, 500)
    return await _maybe(client, "v1/completions", body, refusals)


async def _maybe(
    client: EngineClient,
    path: str,
    body: dict[str, Any] | None = None,
    refusals: Sequence[int] = NOT_THERE,
) -> dict[str, Any]:
    """Empty when the server has no such thing. Raises BackendFailed when it is not well."""
    try:
        return await client.ask(path, body)
    except BackendFailed as error:
        if error.status in refusals:
            return {}
        raise _final(error) from None


def _final(error: BackendFailed) -> BackendFailed | BadConfig:
    """Waiting does not help where a key is wanted or the address is another one."""
    if error.status in (401, 403):
        return BadConfig(
            f"the engine wants another key ({error.status})",
            hint="put it into a file and name that with --backend-key-file",
        )
    if error.status is not None and error.status < 500 and error.status != 429:
        return BadConfig(
            f"no OpenAI-compatible engine is at --backend: {error.message}",
            hint="check the address: PORT and path, with or without /v1",
        )
    return error


def _first_choice(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    choices = answer.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else {}
    return first if isinstance(first, dict) else {}


def _counted(answer: Mapping[str, Any]) -> int | None:
    usage = answer.get("usage")
    return usage.get("prompt_tokens") if isinstance(usage, dict) else None
