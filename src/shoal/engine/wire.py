"""Hidden states as bytes: row after row, little-endian, in the type that the stages compute in."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import BadMessage
from ..models.slice import DTYPES

ALIGNMENT = 16  # bytes; what arrives inside a frame may start anywhere


def hidden_to_wire(hidden: Tensor) -> memoryview:
    """The tensor's own memory; copied only when it is on a device or not contiguous."""
    raw = hidden.detach().contiguous().view(torch.uint8).cpu().numpy()
    return memoryview(raw.reshape(-1).data)


def hidden_from_wire(
    buffer: bytes | bytearray | memoryview, dtype: str, width: int, count: int | None = None
) -> Tensor:
    """(tokens, width). Shares the buffer's memory when it is writable and aligned.

    Raises BadMessage when the length is not that of `count` tokens (of some, when `count` is None).
    """
    kind = DTYPES[dtype]
    view = memoryview(buffer)
    row_bytes = width * kind.itemsize
    if not view.nbytes or view.nbytes % row_bytes or count not in (None, view.nbytes // row_bytes):
        raise BadMessage(f"{view.nbytes} bytes of hidden states, tokens have {row_bytes} each")
    if view.readonly:
        view = memoryview(bytearray(view))
    hidden = torch.frombuffer(view, dtype=torch.uint8)
    if hidden.data_ptr() % ALIGNMENT:
        hidden = hidden.clone()
    return hidden.view(kind).view(-1, width)
