"""`shoal show MODEL`: what a model is and what it takes in memory. No weights are read."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from ..units import Quant, readable_bytes
from .options import AsJson, Dtype
from .output import data, json_line, printable, table

if TYPE_CHECKING:
    from ..models.checkpoint import Checkpoint

HEADERS = ("QUANT", "A LAYER", "EMBEDDING", "HEAD", "WHOLE", "CACHE OF 1000 TOKENS")
QUANTS: tuple[Quant, ...] = ("none", "int8", "int4", "w8", "w4")
TOKENS = 1000
KEPT = {
    "none": "weights in floats, as they are computed with",
    "int8": "a byte a weight and a scale for each row",
    "int4": "4.25 bits a weight with the compiled kernels, a byte without; the head as int8",
    "w8": "a byte a weight, computed with in floats: for GPUs",
    "w4": "5 bits a weight, computed with in floats; the head as w8: for GPUs",
}


class Memory(msgspec.Struct, frozen=True):
    """Bytes with one kind of weights. A tied head is the embedding, and counts once in `whole`."""

    quant: Quant
    layers: tuple[int, ...]
    embedding: int
    head: int
    tied: bool
    whole: int
    cache_per_1000_tokens: int


class Stored(msgspec.Struct, frozen=True):
    """How the weights lie on disk. `dequantised`: how many of each layout become floats on the way
    in; the others are read as they are.
    """

    method: str  # of the checkpoint's own configuration, "" for floats
    bytes: int
    weights: int
    dequantised: dict[str, int]


class Shown(msgspec.Struct, frozen=True):
    name: str
    model: str
    architecture: str
    layers: int
    parameters: int
    context_length: int
    dtype: str
    state_layers: int
    stored: Stored
    memory: tuple[Memory, ...]


def show(
    model: Annotated[
        str, typer.Argument(help="A folder, GGUF file, Hugging Face id or shoal-tiny.")
    ],
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Show what MODEL is and what it takes in memory; no weights are read or fetched."""
    from ..models.checkpoint import open_checkpoint

    shown = described(open_checkpoint(model), dtype)
    if as_json:
        json_line(shown)
    else:
        data("\n".join([*lines(shown), "", table(HEADERS, [row(each) for each in shown.memory])]))


def described(checkpoint: Checkpoint, dtype: str | None = None) -> Shown:
    from ..models.sizes import check_dtype

    own = check_dtype(dtype or checkpoint.dtype)
    return Shown(
        name=checkpoint.name,
        model=checkpoint.model_id,
        architecture=checkpoint.model_type,
        layers=checkpoint.layers,
        parameters=checkpoint.counts.parameters,
        context_length=checkpoint.context_length,
        dtype=own,
        state_layers=checkpoint.counts.state_layers,
        stored=stored(checkpoint),
        memory=memories(checkpoint, own),
    )


def stored(checkpoint: Checkpoint) -> Stored:
    tensors = checkpoint.plain(checkpoint.whole).values()
    by_layout = Counter(tensor.layout.title for tensor in tensors if tensor.layout is not None)
    size = sum(tensor.stored_bytes for tensor in tensors)
    return Stored(checkpoint.method, size, len(tensors), dict(by_layout))


def memories(checkpoint: Checkpoint, dtype: str) -> tuple[Memory, ...]:
    """A GGUF file is computed as it is packed, without a choice."""
    from ..models.gguf_checkpoint import EMBEDDING, GgufCheckpoint

    if not isinstance(checkpoint, GgufCheckpoint):
        return tuple(memory(checkpoint, quant, dtype) for quant in QUANTS)
    layers, sizes = tuple(checkpoint.layer_bytes), checkpoint.gguf.tensors
    embedding, head = sizes[EMBEDDING].bytes, sizes[checkpoint.head].bytes
    whole, cache = checkpoint.slice_bytes(checkpoint.whole), checkpoint.kv_bytes_per_token
    total = cache * checkpoint.layers * TOKENS
    return (Memory("none", layers, embedding, head, checkpoint.tied, whole, total),)


def memory(checkpoint: Checkpoint, quant: Quant, dtype: str) -> Memory:
    from ..models.sizes import model_sizes

    sizes = model_sizes(checkpoint, quant, dtype)
    return Memory(
        quant=quant,
        layers=sizes.layers,
        embedding=sizes.embedding,
        head=sizes.head,
        tied=sizes.tied,
        whole=sizes.whole,
        cache_per_1000_tokens=sizes.cache_per_token * TOKENS,
    )


def lines(shown: Shown) -> list[str]:
    """The facts above the table."""
    facts = [
        shown.architecture,
        f"{shown.layers} layers",
        f"{readable_count(shown.parameters)} parameters",
        f"context of {shown.context_length} tokens",
    ]
    told = [f"{shown.name}    {' · '.join(facts)}", *stored_lines(shown)]
    if shown.state_layers:
        told.append(
            f"states    {shown.state_layers} layers keep a running state, of one size for each "
            "conversation, and add nothing to the cache"
        )
    kept = [f"{each.quant:<10}{KEPT[each.quant]}" for each in shown.memory]
    return [printable(line) for line in (*told, *(kept if len(kept) > 1 else ()))]


def stored_lines(shown: Shown) -> list[str]:
    stored, size = shown.stored, readable_bytes(shown.stored.bytes)
    if stored.method == "gguf":
        return [f"stored    {size} as a GGUF file, which llama.cpp computes as it is packed"]
    if not stored.dequantised:
        return [f"stored    {size}, weights in floats"]
    kinds = ", ".join(f"{count} as {title}" for title, count in stored.dequantised.items())
    rest = stored.weights - sum(stored.dequantised.values())
    return [
        f"stored    {size} by {stored.method}: {kinds}, {rest} in floats",
        f"read      all as {shown.dtype}, layer by layer; what is kept in memory is up to --quant",
    ]


def row(memory: Memory) -> tuple[str, ...]:
    smallest, largest = (readable_bytes(pick(memory.layers)) for pick in (min, max))
    layer = largest if smallest == largest else f"{smallest} to {largest}"
    head = "is the embedding" if memory.tied else readable_bytes(memory.head)
    return (
        memory.quant,
        layer,
        readable_bytes(memory.embedding),
        head,
        readable_bytes(memory.whole),
        readable_bytes(memory.cache_per_1000_tokens),
    )


def readable_count(numbers: int) -> str:
    """8030261248 -> '8.0 billion'."""
    for unit, size in (("billion", 10**9), ("million", 10**6)):
        if numbers >= size:
            return f"{numbers / size:.1f} {unit}"
    return str(numbers)
