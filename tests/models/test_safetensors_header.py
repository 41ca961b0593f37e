import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from shoal.errors import UnsupportedModel
from shoal.models.safetensors_header import read_header


def file_with(folder: Path, header: object, data: bytes = bytes(64)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def tensor(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}


def test_it_reads_what_the_library_wrote(tmp_path: Path) -> None:
    written = {
        "a": torch.arange(12.0).view(3, 4),
        "b": torch.zeros(2, dtype=torch.bfloat16),
        "c": torch.tensor(7),
    }
    path = tmp_path / "some.safetensors"
    save_file(written, path, metadata={"format": "pt"})
    found = read_header(path)
    assert {name: (info.dtype, info.shape) for name, info in found.items()} == {
        "a": ("F32", (3, 4)),
        "b": ("BF16", (2,)),
        "c": ("I64", ()),
    }
    raw = path.read_bytes()
    for name, info in found.items():
        held = raw[info.offset : info.offset + info.bytes]
        assert held == bytes(written[name].view(-1).view(torch.uint8).tolist())


@pytest.mark.parametrize(
    "header",
    [
        tensor("F32", [4, 4], 0, 60),  # fewer bytes than the shape wants
        tensor("F32", [4, 5], 0, 80),  # beyond the end of the file
        tensor("F32", [2], -8, 0),
        tensor("F32", [-1, -4], 0, 16),
        tensor("F32", [2], 8, 0),
        tensor("PICKLE", [2], 0, 8),
        {"x": {"dtype": "F32", "shape": "big", "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [1 << 70], "data_offsets": [0, 8]}},
        {"x": 5},
        [],
        b"not json at all",
        b"[" * 60_000,
        b"",
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: object) -> None:
    with pytest.raises(UnsupportedModel):
        read_header(file_with(tmp_path, header))


def test_a_header_longer_than_the_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    with pytest.raises(UnsupportedModel, match="a header of 4611686018427387904 bytes"):
        read_header(path)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=80))
def test_random_bytes_are_refused_and_nothing_else_happens(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(data)
        with pytest.raises(UnsupportedModel):
            read_header(path)
