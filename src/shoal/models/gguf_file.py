"""GGUF files: the table of contents read without trusting the file, and slices of them written.

Layout, little-endian: magic, version, number of tensors and of entries; the entries (name, type,
value); the tensor table (name, dimensions innermost first, type, offset); padding; the tensors.
A file's tensors are copied as they lie, whatever their type: nothing here knows how numbers are
packed. Source: ggml/docs/gguf.md of llama.cpp, versions 2 and 3.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import IO, Any, BinaryIO

from ..errors import ModelNotFound, UnsupportedModel

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_ENTRIES = 1 << 16
MAX_TENSORS = 1 << 17
MAX_ITEMS = 1 << 22  # of one list: vocabularies have 2^18
MAX_STRING_BYTES = 1 << 24  # a chat template
MAX_DIMENSIONS = 4
STRING, LIST = 8, 9
SCALARS = dict(zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True))
U32, F32_TENSOR = 4, 0


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """`bytes` may include padding; `offset` counts from the file's start."""

    dimensions: tuple[int, ...]  # innermost first
    type: int
    offset: int
    bytes: int


@dataclass(frozen=True)
class GgufFile:
    """`raw` holds each entry as it stands in the file, name and type included."""

    path: Path
    entries: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor] = field(repr=False)
    raw: Mapping[str, bytes] = field(repr=False)

    @property
    def alignment(self) -> int:
        return int(self.entries.get("general.alignment", 32))


def read_gguf(path: Path) -> GgufFile:
    """Raises ModelNotFound when there is none, UnsupportedModel when it is damaged or no GGUF."""
    try:
        with path.open("rb", buffering=1 << 20) as file:
            return _Reader(path, file).file()
    except FileNotFoundError:
        raise ModelNotFound(
            f"there is no file {path}", hint="check the path of the model"
        ) from None
    except (OSError, ValueError, OverflowError) as error:
        raise UnsupportedModel(f"{path.name} cannot be read: {error}") from None


class _Reader:
    """Goes through the file once. What does not add up is a ValueError."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file, self._at = path, file, 0
        self._bytes = path.stat().st_size
        self._taken: list[bytes] = []  # since the entry began

    def file(self) -> GgufFile:
        if self._take(4) != MAGIC:
            raise ValueError("it is no GGUF file")
        (version,) = self._numbers("I")
        if version not in VERSIONS:
            raise ValueError(f"GGUF version {version} is not read, only {VERSIONS}")
        tensors, count = self._numbers("QQ")
        if tensors > MAX_TENSORS or count > MAX_ENTRIES:
            raise ValueError(f"{tensors} tensors and {count} entries are too many")
        entries, raw = {}, {}
        for _ in range(count):
            self._taken.clear()
            name = self._text()
            entries[name] = self._value(*self._numbers("I"))
            raw[name] = b"".join(self._taken)
        return GgufFile(self._path, entries, self._tensors(tensors, entries), raw)

    def _tensors(self, count: int, entries: Mapping[str, Any]) -> dict[str, GgufTensor]:
        table = [self._tensor() for _ in range(count)]
        alignment = entries.get("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= 1 << 16 or alignment % 8:
            raise ValueError(f"its tensors are aligned to {alignment} bytes")
        start = padded(self._at, alignment)
        ends = [*sorted({offset for *_, offset in table}), self._bytes - start]
        if ends[-1] < 0 or any(a > b for a, b in pairwise(ends)):
            raise ValueError("it is cut off: a tensor lies beyond its end")
        following = dict(pairwise(ends))
        tensors = {
            name: GgufTensor(shape, kind, start + offset, following[offset] - offset)
            for name, shape, kind, offset in table
        }
        if len(tensors) != count or len(following) != count:
            raise ValueError("two of its tensors share a name or a place")
        return tensors

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._text()
        (dimensions,) = self._numbers("I")
        if dimensions > MAX_DIMENSIONS:
            raise ValueError(f"{name[:80]} has {dimensions} dimensions")
        shape = self._numbers("Q" * dimensions)
        if prod(shape) >= 1 << 48:
            raise ValueError(f"{name[:80]} has {shape} numbers")
        kind, offset = self._numbers("IQ")
        return name, shape, kind, offset

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._text()
        if kind != LIST:
            return self._numbers(self._code(kind))[0]
        item, count = self._numbers("IQ")
        if count > MAX_ITEMS:
            raise ValueError(f"a list of {count} items")
        if item == STRING:
            return [self._text() for _ in range(count)]
        return list(self._numbers(f"{count}{self._code(item)}"))

    @staticmethod
    def _code(kind: int) -> str:
        if kind not in SCALARS:  # lists of lists are in no file that anybody writes
            raise ValueError(f"values of kind {kind} are not read")
        return SCALARS[kind]

    def _text(self) -> str:
        (size,) = self._numbers("Q")
        if size > MAX_STRING_BYTES:
            raise ValueError(f"a text of {size} bytes")
        return self._take(size).decode("utf-8", "surrogateescape")

    def _numbers(self, codes: str) -> tuple[Any, ...]:
        form = f"<{codes}"
        return struct.unpack(form, self._take(struct.calcsize(form)))

    def _take(self, size: int) -> bytes:
        self._at += size
        data = self._file.read(size) if self._at <= self._bytes else b""
        if len(data) < size:
            raise ValueError("it is cut off")
        self._taken.append(data)
        return data


# ---- writing


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of the new file: `source` names it in the old one; None is zeros of f32."""

    name: str
    source: str | None
    dimensions: tuple[int, ...] = ()


def padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def text_entry(name: str, value: str) -> bytes:
    return _text(name) + struct.pack("<I", STRING) + _text(value)


def number_entry(name: str, value: int) -> bytes:
    return _text(name) + struct.pack("<II", U32, value)


def _text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


def write_gguf(out: IO[bytes], of: GgufFile, entries: Iterable[bytes], parts: list[Part]) -> None:
    """Write a file of these entries and parts, whose tensors are copied from `of`."""
    packed = list(entries)
    out.write(MAGIC + struct.pack("<IQQ", 3, len(parts), len(packed)) + b"".join(packed))
    offset = 0
    sizes = [_size(part, of) for part in parts]
    for part, size in zip(parts, sizes, strict=True):
        old = of.tensors[part.source] if part.source else None
        shape, kind = (old.dimensions, old.type) if old else (part.dimensions, F32_TENSOR)
        out.write(_text(part.name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape))
        out.write(struct.pack("<IQ", kind, offset))
        offset += padded(size, of.alignment)
    with of.path.open("rb") as source:
        for part, size in zip(parts, sizes, strict=True):
            _pad(out, of.alignment)
            _copy(out, source, of.tensors[part.source] if part.source else None, size)
        _pad(out, of.alignment)


def _size(part: Part, of: GgufFile) -> int:
    return of.tensors[part.source].bytes if part.source else 4 * prod(part.dimensions)


def _pad(out: IO[bytes], alignment: int) -> None:
    out.write(bytes(-out.tell() % alignment))


def _copy(out: IO[bytes], source: IO[bytes], tensor: GgufTensor | None, size: int) -> None:
    if tensor is None:
        out.write(bytes(size))
        return
    source.seek(tensor.offset)
    while size:
        data = source.read(min(size, 1 << 22))
        if not data:
            raise UnsupportedModel("the GGUF file became shorter while it was read")
        out.write(data)
        size -= len(data)
