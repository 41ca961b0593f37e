"""Reads single tensors of a safetensors file into memory of our own.

The library's own reader maps files into memory: a file that is overwritten or cut off while a model
runs would change its weights or kill the process.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..errors import UnsupportedModel
from .safetensors_header import TensorInfo, damaged

TYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def read_tensor(folder: Path, info: TensorInfo) -> Tensor:
    """Its bytes and no others. Raises UnsupportedModel when the file has become shorter, or for a
    type that torch lacks.
    """
    if info.dtype not in TYPES:
        raise UnsupportedModel(f"{info.file} holds {info.dtype}, which torch cannot read")
    held = torch.empty(info.bytes, dtype=torch.uint8)
    room = held.numpy().data
    with (folder / info.file).open("rb", buffering=0) as file:
        file.seek(info.offset)
        done = 0
        while done < info.bytes:
            got = file.readinto(room[done:])  # not always all: systems read 2 GB at most
            if not got:
                raise damaged(info.file, "it became shorter while it was read")
            done += got
    return held.view(TYPES[info.dtype]).view(info.shape)
