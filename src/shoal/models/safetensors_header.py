"""The table of contents of a safetensors file, read without torch and without trusting the file.

Layout: 8 bytes little-endian header length, that many bytes of JSON, then the raw tensors one
after the other.
"""

from __future__ import annotations

from math import prod
from pathlib import Path

import msgspec

from ..errors import UnsupportedModel

MAX_HEADER_BYTES = 100 << 20  # the format's own limit
DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}


class TensorInfo(msgspec.Struct, frozen=True):
    """Where one tensor lies: `file` is a plain name inside the checkpoint, `offset` counts from
    the file's start.
    """

    file: str
    dtype: str  # as safetensors writes it: F32, BF16, ...
    shape: tuple[int, ...]
    bytes: int
    offset: int


class _Entry(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one file. Raises UnsupportedModel when the file is cut off, damaged or not
    safetensors.
    """
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, file_bytes - 8):
            raise damaged(path.name, f"a header of {header_bytes} bytes in a file of {file_bytes}")
        header = file.read(header_bytes)
    data_at = 8 + header_bytes
    return {
        name: _info(path.name, name, entry, data_at, file_bytes)
        for name, entry in _entries(path.name, header).items()
    }


def damaged(file: str, why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{file} is not a whole safetensors file: {why}",
        hint="download the file again; only safetensors is read, never pickle (.bin, .pt)",
    )


def _entries(file: str, header: bytes) -> dict[str, _Entry]:
    try:
        table = msgspec.json.decode(header, type=dict[str, object])
        table.pop("__metadata__", None)
        return msgspec.convert(table, dict[str, _Entry])
    except (ValueError, RecursionError) as error:
        raise damaged(file, f"its header does not decode ({error})") from None


def _info(file: str, name: str, entry: _Entry, data_at: int, file_bytes: int) -> TensorInfo:
    begin, end = entry.data_offsets
    width = DTYPE_BYTES.get(entry.dtype)
    if width is None:
        raise UnsupportedModel(f"tensor {name} has the unknown type {entry.dtype}")
    if min(entry.shape, default=0) < 0 or end - begin != prod(entry.shape) * width:
        raise damaged(file, f"tensor {name} of shape {entry.shape} has {end - begin} bytes")
    if begin < 0 or data_at + end > file_bytes:
        raise damaged(file, f"tensor {name} ends at byte {data_at + end} of {file_bytes}")
    return TensorInfo(file, entry.dtype, entry.shape, end - begin, data_at + begin)
