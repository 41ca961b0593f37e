"""A GGUF file as a checkpoint: the same questions answered as for a folder in Hugging Face form.

Only families whose slices were proved to compute what the whole file does are taken: those whose
layers are all alike, since llama.cpp counts the layers of a slice from 0. Nothing of the file is
executed.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..errors import InvalidRequest, UnsupportedModel
from ..units import ModelId, Slice
from .checkpoint import GGUF, SAMPLED_BYTES, SAMPLED_TENSORS, Checkpoint
from .gguf_file import (
    GgufFile,
    GgufTensor,
    Part,
    number_entry,
    read_gguf,
    text_entry,
    write_gguf,
)
from .gguf_text import gguf_tokenizer
from .safetensors_header import TensorInfo
from .text import Tokenizer

FAMILIES = ("llama", "qwen2", "qwen3")  # tests/engine/test_gguf.py proves each
EMBEDDING, NORM, HEAD = "token_embd.weight", "output_norm.weight", "output.weight"
HOUSE_NAMES = {
    EMBEDDING: "model.embed_tokens.weight",
    NORM: "model.norm.weight",
    HEAD: "lm_head.weight",
}
BLOCK = re.compile(r"blk\.(\d+)\.(.+)", re.DOTALL)
ENDS = ("rope_freqs.weight",)  # beside the blocks: every slice needs it


@dataclass(frozen=True, eq=False)
class GgufCheckpoint(Checkpoint):
    """`config` is written as `config.json` would be; `tensors` go by the names they have there."""

    file: GgufFile | None = None

    @property
    def gguf(self) -> GgufFile:
        assert self.file is not None  # noqa: S101 - a default only because the fields before have one
        return self.file

    @property
    def method(self) -> str:
        return "gguf"

    @property
    def kv_bytes_per_token(self) -> int:
        """Of one layer, in llama.cpp's cache of f16."""
        return int(2 * 2 * self.config["num_key_value_heads"] * self.config["head_dim"])

    def open_tokenizer(self) -> Tokenizer:
        return gguf_tokenizer(self.gguf)

    def ensure_files(self, layers: Slice) -> None:
        """There is one file, and it is here."""

    @property
    def family(self) -> str:
        return str(self.gguf.entries["general.architecture"])

    @property
    def head(self) -> str:
        """The name of the output matrix: the embedding's when they are one."""
        return HEAD if HEAD in self.gguf.tensors else EMBEDDING

    # ---- slices

    def write_slice(self, layers: Slice, out: IO[bytes]) -> None:
        """These layers as a file of their own, counted from 0. Hidden states go in at the bottom of
        every slice; the head of a last one stands in the embedding's place, and others have one of
        a single row.
        """
        if layers.stop > self.layers:
            raise InvalidRequest(f"{self.name} has {self.layers} layers, not {layers.stop}")
        last = layers.stop == self.layers
        ends = (
            [Part(EMBEDDING, self.head)] if last else [Part(EMBEDDING, None, (self.hidden_size, 1))]
        )
        ends += [
            Part(NORM, NORM),
            *(Part(name, name) for name in ENDS if name in self.gguf.tensors),
        ]
        blocks = [
            Part(f"blk.{int(found[1]) - layers.start}.{found[2]}", name)
            for name in self.gguf.tensors
            if (found := BLOCK.fullmatch(name)) and layers.start <= int(found[1]) < layers.stop
        ]
        entries = self._entries(len(layers), self.vocab_size if last else 1)
        write_gguf(out, self.gguf, entries, [*ends, *blocks])

    def _entries(self, blocks: int, vocab_size: int) -> list[bytes]:
        own = (f"{self.family}.block_count", f"{self.family}.vocab_size")
        kept = [
            raw
            for name, raw in self.gguf.raw.items()
            if name not in own and not name.startswith("tokenizer.")
        ]
        counts = zip(own, (blocks, vocab_size), strict=True)
        return [
            *kept,
            text_entry("tokenizer.ggml.model", "none"),
            *(number_entry(name, count) for name, count in counts),
        ]


def open_gguf(path: Path, *, any_family: bool = False) -> GgufCheckpoint:
    """With `any_family` it may be one that cannot be sliced here: another engine computes it.

    Raises ModelNotFound when there is no file, UnsupportedModel when it is not one for us.
    """
    file = read_gguf(path)
    name = path.name.removesuffix(GGUF)
    config = _config(file, name, any_family=any_family)
    tensors = {_house_name(key): _info(tensor) for key, tensor in file.tensors.items()}
    if not any_family:
        _check_layers(file, name, int(config["num_hidden_layers"]))
    return GgufCheckpoint(name, path.parent, config, tensors, _fingerprint(file), file=file)


def _config(file: GgufFile, name: str, *, any_family: bool) -> dict[str, Any]:
    family = file.entries.get("general.architecture")
    if family not in FAMILIES and not any_family:
        raise UnsupportedModel(
            f"{name} is of the family {str(family)[:40]!r}; as GGUF only {', '.join(FAMILIES)} are "
            "known to survive slicing",
            hint="take the model in Hugging Face form, or run llama.cpp's server with this file "
            "and front it: shoal up --backend URL",
        )
    keys = {
        "num_hidden_layers": "block_count",
        "hidden_size": "embedding_length",
        "max_position_embeddings": "context_length",
        "num_attention_heads": "attention.head_count",
    }
    config = {ours: _count(file, f"{family}.{theirs}") for ours, theirs in keys.items()}
    heads, entries = config["num_attention_heads"], file.entries
    config["num_key_value_heads"] = int(entries.get(f"{family}.attention.head_count_kv", heads))
    width = entries.get(f"{family}.attention.key_length", config["hidden_size"] // heads)
    shape = file.tensors[EMBEDDING].dimensions if EMBEDDING in file.tensors else ()
    if len(shape) != 2 or shape[0] != config["hidden_size"]:
        raise UnsupportedModel(f"{name} has no embedding of {config['hidden_size']} numbers")
    return {
        "model_type": family,
        "dtype": "float16",  # of the cache
        "vocab_size": shape[1],
        "head_dim": int(width),
        **config,
    }


def _count(file: GgufFile, key: str) -> int:
    """Lists, one entry a layer, belong to models whose layers are not alike."""
    value = file.entries.get(key)
    if type(value) is not int or not 1 <= value <= 1 << 24:
        raise UnsupportedModel(f"{file.path.name} says nothing we understand of {key}")
    return value


def _check_layers(file: GgufFile, name: str, layers: int) -> None:
    """Every layer must be there, all with the same parts."""
    parts: dict[int, set[str]] = {}
    for key in file.tensors:
        if found := BLOCK.fullmatch(key):
            parts.setdefault(int(found[1]), set()).add(found[2])
    if sorted(parts) != list(range(layers)) or len({frozenset(p) for p in parts.values()}) != 1:
        raise UnsupportedModel(f"{name} has not {layers} layers that are all alike")
    if NORM not in file.tensors:
        raise UnsupportedModel(f"{name} has no {NORM}")


def _house_name(name: str) -> str:
    found = BLOCK.fullmatch(name)
    return f"model.layers.{found[1]}.{found[2]}" if found else HOUSE_NAMES.get(name, name)


def _info(tensor: GgufTensor) -> TensorInfo:
    shape = tuple(reversed(tensor.dimensions))
    return TensorInfo("", f"ggml {tensor.type}", shape, tensor.bytes, tensor.offset)


def _fingerprint(file: GgufFile) -> ModelId:
    """sha256 over the entries, the table of tensors, and samples of them."""
    sha = hashlib.sha256(b"shoal gguf 1\n")
    for name in sorted(file.raw):
        sha.update(b"%d:" % len(file.raw[name]) + file.raw[name])
    every = max(1, len(file.tensors) // SAMPLED_TENSORS)
    with file.path.open("rb") as data:
        for place, name in enumerate(sorted(file.tensors)):
            tensor = file.tensors[name]
            sha.update(f"{name}:{tensor.dimensions}:{tensor.type}\n".encode(errors="replace"))
            if place % every == 0:
                data.seek(tensor.offset)
                sha.update(data.read(min(SAMPLED_BYTES, tensor.bytes)))
    return ModelId(sha.hexdigest()[:16])
