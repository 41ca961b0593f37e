"""A model's files as the rest of shoal sees them: sizes, names and a fingerprint. No torch, no
transformers.

A checkpoint is a folder in Hugging Face form: `config.json`, safetensors files (with an index when
there are several),
`tokenizer.json`. It comes from a local folder, from the hub, or is the built-in one. Nothing in it
is ever executed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from ..errors import ModelNotFound, UnsupportedModel
from ..units import ModelId, Slice
from . import hub
from .published import Layout, Plain, architecture, described, layouts_of, plain_tensors
from .safetensors_header import TensorInfo, damaged, read_header
from .sizes import Counts, count
from .text import Tokenizer

BUILTIN = "shoal-tiny"
BUILTIN_FOLDER = Path(__file__).parent / "builtin"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
GGUF = ".gguf"
MAX_JSON_BYTES = 64 << 20
SAMPLED_TENSORS = 512  # how many tensors the fingerprint looks into
SAMPLED_BYTES = 256
VOLATILE_KEYS = ("_name_or_path", "transformers_version")  # say nothing about the model
LAYER_KEY = re.compile(r"(?:^|\.)layers\.(\d+)\.")
PREDICTORS = "mtp."  # small layers of their own that guess several tokens at once
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
DTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
STORED = {"F32": "f32", "BF16": "bf16", "F16": "f16"}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """One model. `tensors` is empty only when a gateway has just the small files.

    `source` is the hub's repository, "" for a local folder; `config` is `config.json` as it stands.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo] = field(repr=False)
    model_id: ModelId
    source: str = ""

    @property
    def model_type(self) -> str:
        return str(self.config["model_type"])

    @property
    def architecture(self) -> dict[str, Any]:
        """`config.json` without a word of how the weights are stored."""
        return architecture(self.config)

    @property
    def method(self) -> str:
        """By which method it is stored quantised, for example gptq; "" for floats."""
        return described(self.config)

    @cached_property
    def layouts(self) -> tuple[Layout, ...]:
        return layouts_of(self.name, self.config)

    @cached_property
    def counts(self) -> Counts:
        """Raises UnsupportedModel when stored tensors do not fit their layout."""
        return count(self.plain(self.whole), self.layers, layer_of)

    @property
    def layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def hidden_size(self) -> int:
        return int(self.config["hidden_size"])

    @property
    def vocab_size(self) -> int:
        return int(self.config["vocab_size"])

    @property
    def whole(self) -> Slice:
        return Slice(0, self.layers)

    @property
    def tied(self) -> bool:
        """The head is the embedding again."""
        return not any("lm_head." in name for name in self.tensors)

    @cached_property
    def dtype(self) -> str:
        """The checkpoint's own type: f32, bf16 or f16; what `config.json` says, else what most
        bytes are.
        """
        named = DTYPES.get(str(self.config.get("dtype", self.config.get("torch_dtype"))))
        return named or self._stored_dtype()

    def _stored_dtype(self) -> str:
        held = dict.fromkeys(STORED.values(), 0)
        for info in self.tensors.values():
            if info.dtype in STORED:
                held[STORED[info.dtype]] += info.bytes
        return max(held, key=lambda name: held[name])

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together. Where the rotary scaling would switch with the
        length, it stops before.

        (longrope and dynamic choose their frequencies by the longest sequence of a batch: beyond
        the original length
        a request's result would depend on its neighbours.)
        """
        limit = int(self.config.get("max_position_embeddings", 2048))
        rope = self.config.get("rope_scaling") or self.config.get("rope_parameters") or {}
        if isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) in ("longrope", "su"):
            original = self.config.get("original_max_position_embeddings")
            return min(limit, int(rope.get("original_max_position_embeddings", original) or limit))
        return limit

    def own(self, layers: Slice) -> dict[str, TensorInfo]:
        """The tensors that a stage with these layers needs; the ends of the model bring embedding
        and head.
        """
        first, last = layers.start == 0, layers.stop == self.layers
        return {
            name: info
            for name, info in self.tensors.items()
            if _needed(name, layers, first=first, last=last, tied=self.tied)
        }

    def plain(self, layers: Slice) -> dict[str, Plain]:
        """The same under the names and in the shapes that the architecture knows, quantised or not.

        Raises UnsupportedModel when the stored tensors do not fit their layout.
        """
        return plain_tensors(self.own(layers), self.layouts)

    def slice_bytes(self, layers: Slice) -> int:
        """As stored."""
        return sum(info.bytes for info in self.own(layers).values())

    @cached_property
    def layer_bytes(self) -> list[int]:
        """Bytes of each layer as stored, without embedding and head."""
        sizes = [0] * self.layers
        for name, info in self.tensors.items():
            layer = layer_of(name)
            if layer is not None and layer < self.layers:
                sizes[layer] += info.bytes
        return sizes

    def open_tokenizer(self) -> Tokenizer:
        """Raises UnsupportedModel when there is none that we can read."""
        return Tokenizer.open(self.folder)

    def ensure_files(self, layers: Slice) -> None:
        """Download what these layers need and the cache lacks. Raises ModelNotFound when it cannot
        be had.
        """
        files = {info.file for info in self.own(layers).values()}
        missing = sorted(name for name in files if not (self.folder / name).exists())
        if missing and not self.source:
            raise ModelNotFound(
                f"{self.name} lacks {', '.join(missing)} in {self.folder}",
                hint="copy what is missing there",
            )
        if missing:
            hub.fetch(self.source, missing, revision=self.folder.name)
        for name in files:  # where tensors lie is known only of files that are here
            held = read_header(self.folder / name)
            self.tensors.update({key: held[key] for key in held.keys() & self.tensors.keys()})


def layer_of(tensor: str) -> int | None:
    found = None if tensor.startswith(PREDICTORS) else LAYER_KEY.search(tensor)
    return int(found[1]) if found else None


def _needed(name: str, layers: Slice, *, first: bool, last: bool, tied: bool) -> bool:
    """Multi-token prediction heads, which some families count as layers beyond the last, are
    nobody's.
    """
    if name.startswith(PREDICTORS):
        return False
    layer = layer_of(name)
    if layer is not None:
        return layers.start <= layer < layers.stop
    if "embed_tokens" in name:
        return first or (last and tied)
    return last


def is_hub_id(name: str) -> bool:
    """True for `ORGANISATION/NAME`, whether or not the hub has it."""
    return HUB_NAME.fullmatch(name) is not None


def open_checkpoint(name: str, *, download: bool = True) -> Checkpoint:
    """Open a local folder, a hub id `ORGANISATION/NAME` or the built-in `shoal-tiny`; no weights
    are read or fetched.

    Raises ModelNotFound when there is none, UnsupportedModel when it is one that shoal cannot read.
    """
    if name == BUILTIN:
        return _open_folder(BUILTIN_FOLDER, name)
    folder = Path(name).expanduser()
    if name.endswith(GGUF) and folder.is_file():
        from .gguf_checkpoint import open_gguf

        return open_gguf(folder.resolve())
    if folder.is_dir():
        return _open_folder(folder.resolve(), folder.resolve().name)
    if is_hub_id(name):
        return _open_hub(name, download=download)
    raise ModelNotFound(
        f"there is no model {name!r}",
        hint="give a folder with config.json and safetensors files, a .gguf file, a hub id such as "
        f"HuggingFaceTB/SmolLM2-135M-Instruct, or {BUILTIN}",
    )


def open_without_weights(name: str) -> Checkpoint:
    """The same for whoever lets another engine compute: a folder needs no weights, and a GGUF file
    may be of any family.
    """
    folder = Path(name).expanduser().resolve()
    if name.endswith(GGUF) and folder.is_file():
        from .gguf_checkpoint import open_gguf

        return open_gguf(folder, any_family=True)
    try:
        return open_checkpoint(name)
    except ModelNotFound:
        if not (folder / "config.json").is_file():
            raise
    config = _read_config(folder, folder.name)
    return Checkpoint(folder.name, folder, config, {}, _Fingerprint(config, folder).model_id)


def _open_folder(folder: Path, name: str) -> Checkpoint:
    config = _read_config(folder, name)
    tensors = dict(_local_tensors(folder))
    print_of = _Fingerprint(config, folder)
    print_of.tensors(tensors, folder)
    return _summed(Checkpoint(name, folder, config, tensors, print_of.model_id))


def _open_hub(repo: str, *, download: bool) -> Checkpoint:
    """The fingerprint covers the commit instead of sampled bytes, so that it is the same before
    and after a download.
    """
    folder = hub.fetch(repo, hub.SMALL_FILES, download=download)
    config = _read_config(folder, repo)
    try:
        tensors = dict(_local_tensors(folder))
    except ModelNotFound:
        if not download:
            raise
        tensors = hub.remote_tensors(repo, folder.name)
        for info in tensors.values():
            _check_file_name(info.file)
    print_of = _Fingerprint(config, folder)
    print_of.add(repo, folder.name)
    return _summed(Checkpoint(repo, folder, config, tensors, print_of.model_id, source=repo))


def _summed(checkpoint: Checkpoint) -> Checkpoint:
    """Sum up its parts while we are at it: stored tensors that do not fit are refused at once."""
    _ = checkpoint.counts
    return checkpoint


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    config = _read_json(folder / "config.json")
    missing = [
        key
        for key in ("model_type", "num_hidden_layers", "hidden_size", "vocab_size")
        if not isinstance(config.get(key), str if key == "model_type" else int)
    ]
    if missing:
        raise UnsupportedModel(
            f"{name} is not a plain text decoder: its config.json has no {', '.join(missing)}",
            hint="multimodal, encoder-decoder and GPT-2-style models cannot be cut into stages yet",
        )
    layouts_of(name, config)  # raises for what is stored in a way that is not read
    return config


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ModelNotFound(
            f"{path.parent} has no {path.name}", hint="give a folder in Hugging Face form"
        )
    if path.stat().st_size > MAX_JSON_BYTES:
        raise UnsupportedModel(f"{path.name} is larger than {MAX_JSON_BYTES} bytes")
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (ValueError, RecursionError) as error:
        raise UnsupportedModel(f"{path.name} does not decode: {error}") from None


def _local_tensors(folder: Path) -> Iterator[tuple[str, TensorInfo]]:
    """Every tensor that the index (or the single file) promises and its file holds."""
    for file, promised in _promised(folder).items():
        path = folder / file
        if not path.is_file():
            raise ModelNotFound(
                f"{folder} lacks {file}", hint="download the missing file; all parts are needed"
            )
        held = read_header(path)
        if not promised <= held.keys():
            raise damaged(file, "it lacks tensors that the index promises")
        yield from held.items()


def _promised(folder: Path) -> dict[str, set[str]]:
    """The checkpoint's files, each with the tensors that the index says are in it."""
    if (folder / INDEX_FILE).is_file():
        where = _read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(where, dict) or not where:
            raise UnsupportedModel(f"{INDEX_FILE} has no weight_map")
        names: dict[str, set[str]] = {}
        for tensor, file in where.items():
            names.setdefault(_check_file_name(file), set()).add(tensor)
        return names
    if (folder / SINGLE_FILE).is_file():
        return {SINGLE_FILE: set()}
    raise ModelNotFound(
        f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}",
        hint="only safetensors is read, never pickle (.bin, .pt): convert the checkpoint first",
    )


def _check_file_name(name: object) -> str:
    """An index may name files beside it and nothing else."""
    if not isinstance(name, str) or not PLAIN_NAME.fullmatch(name):
        raise UnsupportedModel(f"{INDEX_FILE} names {name!r}, which is no plain safetensors file")
    return name


class _Fingerprint:
    """sha256 over what makes a model that model: configuration, tokenizer, tensor table, samples
    of the weights.
    """

    def __init__(self, config: dict[str, Any], folder: Path) -> None:
        self._hash = hashlib.sha256(b"shoal model 1\n")
        stable = {key: value for key, value in config.items() if key not in VOLATILE_KEYS}
        self.add(msgspec.json.encode(stable, order="sorted").decode())
        tokenizer = folder / "tokenizer.json"
        self._hash.update(tokenizer.read_bytes() if tokenizer.is_file() else b"")

    def add(self, *texts: str) -> None:
        for text in texts:
            self._hash.update(f"{len(text)}:{text}\n".encode())

    def tensors(self, tensors: dict[str, TensorInfo], folder: Path) -> None:
        names = sorted(tensors)
        every = max(1, len(names) // SAMPLED_TENSORS)
        for place, name in enumerate(names):
            info = tensors[name]
            self.add(name, info.dtype, str(info.shape))
            if place % every == 0:
                with (folder / info.file).open("rb") as file:
                    file.seek(info.offset)
                    self._hash.update(file.read(min(SAMPLED_BYTES, info.bytes)))

    @property
    def model_id(self) -> ModelId:
        return ModelId(self._hash.hexdigest()[:16])
