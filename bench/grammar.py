"""What holding an answer to a schema costs: compiling it, a mask for each token, a sampled row.

A byte-level vocabulary is trained on the sources of Python and of the installed packages, as large
as those of today's models. llguidance within our limits, and xgrammar where it is installed, read
the same texts, token by token. Then one row is sampled with a grammar and without.
"""

from __future__ import annotations

import json
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tokenizers
import torch
from contract import Bench, percentile
from tokenizers import decoders, models, pre_tokenizers, trainers

from shoal.engine.grammar import Grammars
from shoal.engine.request import Grammar, Sampling
from shoal.engine.sampling import Samplers, sample
from shoal.models.text import Tokenizer

LINE = {
    "type": "object",
    "properties": {
        "sku": {"type": "string", "minLength": 3, "maxLength": 20},
        "price": {"type": "number"},
        "part": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/line"}]},
    },
    "required": ["sku", "price"],
    "additionalProperties": False,
}
ORDER = {
    "type": "object",
    "properties": {
        "id": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{6}$"},
        "date": {"type": "string", "format": "date-time"},
        "lines": {"type": "array", "maxItems": 20, "items": {"$ref": "#/$defs/line"}},
        "note": {"type": ["string", "null"], "maxLength": 200},
    },
    "required": ["id", "date", "lines", "note"],
    "additionalProperties": False,
    "$defs": {"line": LINE},
}
FIELDS = [f"field_{number}" for number in range(200)]
WIDE = {
    "type": "object",
    "properties": {name: {"type": "string"} for name in FIELDS},
    "required": FIELDS,
    "additionalProperties": False,
}
CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "any object": ({"type": "object"}, {"a": [1, 2, {"b": "a reef in the bay"}], "c": None}),
    "order": (
        ORDER,
        {
            "id": "ABC-123456",
            "date": "2026-01-02T03:04:05Z",
            "lines": [{"sku": "rope-12", "price": 12.5, "part": {"sku": "hook", "price": 1}}],
            "note": "leave it at the harbour",
        },
    ),
    "200 fields": (WIDE, dict.fromkeys(FIELDS, "text")),
}


def texts(most: int) -> Iterator[str]:
    """Sources of Python, up to `most` characters."""
    folders = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))
    for path in (path for folder in folders for path in sorted(Path(folder).rglob("*.py"))):
        text = path.read_text(encoding="utf-8", errors="ignore")[:200_000]
        most -= len(text)
        if most < 0:
            return
        yield text


def vocabulary(size: int) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<end>"],
        show_progress=False,
        min_frequency=1,
    )
    made.train_from_iterator(texts(size * 500), trainer)
    return made


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def with_llguidance(
    grammars: Grammars, schema: dict[str, Any], ids: list[int]
) -> tuple[float, list[float]]:
    grammar = Grammar("json_schema", json.dumps(schema))
    compiling = seconds(lambda: grammars.matcher(grammar, 5))
    matcher, masks = grammars.matcher(grammar, 5), []
    for token in ids:
        masks.append(seconds(matcher.allowed))
        matcher.take(token)
    if not matcher.ended:
        raise AssertionError("the text is none of the grammar")
    return compiling, masks


def with_xgrammar(
    compiler: Any, size: int, schema: dict[str, Any], ids: list[int]
) -> tuple[float, list[float]]:
    import xgrammar

    compiled: list[Any] = []
    compiling = seconds(lambda: compiled.append(compiler.compile_json_schema(json.dumps(schema))))
    matcher, masks = xgrammar.GrammarMatcher(compiled[0]), []
    mask = xgrammar.allocate_token_bitmask(1, size)
    for token in ids:
        masks.append(seconds(lambda: matcher.fill_next_token_bitmask(mask)))
        if not matcher.accept_token(token):
            raise AssertionError("the text is none of the grammar")
    return compiling, masks


def xgrammar_compiler(speech: tokenizers.Tokenizer, end: int) -> Any:
    """None where it is not installed."""
    try:
        import xgrammar
    except ImportError:
        return None
    size = speech.get_vocab_size()
    names = [speech.id_to_token(token) for token in range(size)]
    kind = xgrammar.VocabType.BYTE_LEVEL
    about = xgrammar.TokenizerInfo(names, kind, vocab_size=size, stop_token_ids=[end])
    return xgrammar.GrammarCompiler(about, max_threads=1, cache_enabled=False)


def row_seconds(samplers: Samplers, size: int, ids: list[int], **wanted: Any) -> float:
    state = samplers(Sampling(max_tokens=10_000, **wanted), ())
    took = []
    for token in ids:
        logits = torch.randn(1, size)
        logits[0, token] = 60
        took.append(seconds(lambda logits=logits: sample(logits, [state])))
    return statistics.median(took)


def report(bench: Bench, what: str, compiling: float, masks: list[float]) -> None:
    bench.row(
        what=what,
        compile_ms=compiling * 1e3,
        mask_p50_us=statistics.median(masks) * 1e6,
        mask_p90_us=percentile(masks, 90) * 1e6,
        mask_max_us=max(masks) * 1e6,
    )


def main() -> None:
    bench = Bench("grammar", __doc__)
    torch.set_num_threads(1)
    speech = vocabulary(32_000 if bench.quick else 128_000)
    size, end = speech.get_vocab_size(), speech.token_to_id("<end>")
    made: list[Grammars] = []
    reading = seconds(lambda: made.append(Grammars.of(Tokenizer(speech, eos_ids=(end,)), size)))
    bench.row(what=f"llguidance reads {size} tokens", ms=reading * 1e3)
    compiler = xgrammar_compiler(speech, end)
    for name, (schema, answer) in CASES.items():
        ids = [*speech.encode(json.dumps(answer)).ids, end]
        compiling, masks = with_llguidance(made[0], schema, ids)
        report(bench, f"llguidance, {name}", compiling, masks)
        if compiler is not None:
            report(bench, f"xgrammar, {name}", *with_xgrammar(compiler, size, schema, ids))
    if compiler is None:
        bench.absent("xgrammar", "not installed")
    schema, answer = CASES["order"]
    ids, grammar = speech.encode(json.dumps(answer)).ids, Grammar("json_schema", json.dumps(schema))
    samplers = Samplers(made[0])
    for kind, temperature in (("greedy", 0.0), ("drawn", 1.0)):
        free = row_seconds(samplers, size, ids, temperature=temperature, logprobs=0)
        held = row_seconds(samplers, size, ids, temperature=temperature, grammar=grammar)
        bench.row(what=f"a {kind} row: with logprobs / with a grammar", free_us=free * 1e6,
                  held_us=held * 1e6)  # fmt: skip
        bench.aim(f"a {kind} row with a grammar, over one with logprobs", "<= 2",
                  got=held / free, holds=held / free <= 2)  # fmt: skip
    bench.finish()


if __name__ == "__main__":
    sys.exit(main())
