"""GGUF files as strangers may have written them, and slices of honest ones."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import ModelNotFound, ShoalError, UnsupportedModel
from shoal.models.checkpoint import BUILTIN_FOLDER
from shoal.models.gguf_checkpoint import GgufCheckpoint, open_gguf
from shoal.models.gguf_file import (
    Part,
    number_entry,
    read_gguf,
    text_entry,
    write_gguf,
)
from shoal.units import Slice
from tests.needs import needs


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf(entries: list[bytes], tensors: list[tuple[str, tuple[int, ...], int, int]], data: bytes):
    """A file written by hand: (name, dimensions, type, offset) of each tensor."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries)) + b"".join(entries)
    for name, shape, kind, offset in tensors:
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return head + bytes(-len(head) % 32) + data


SMALL = gguf(
    [text_entry("general.architecture", "llama"), number_entry("n", 7)],
    [("a", (4, 2), 0, 0), ("b", (8,), 0, 32)],
    bytes(range(64)),
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> GgufCheckpoint:
    needs("gguf")
    from tests.gguf_files import write_gguf as convert

    folder = tmp_path_factory.mktemp("gguf")
    return open_gguf(convert(BUILTIN_FOLDER, folder / "tiny.gguf"))


def read(tmp_path: Path, content: bytes):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    return read_gguf(path)


def test_entries_and_tensors_are_found(tmp_path: Path) -> None:
    file = read(tmp_path, SMALL)
    assert file.entries == {"general.architecture": "llama", "n": 7}
    assert file.tensors["b"].dimensions == (8,)
    assert SMALL[file.tensors["b"].offset :][: file.tensors["b"].bytes] == bytes(range(32, 64))


@given(st.integers(min_value=0, max_value=len(SMALL) - 1))
def test_a_file_that_is_cut_off_is_refused(tmp_path_factory: pytest.TempPathFactory, at: int):
    folder = tmp_path_factory.mktemp("cut")
    if at < len(SMALL) - 32:  # the last tensor's end is not written anywhere
        with pytest.raises(UnsupportedModel):
            read(folder, SMALL[:at])


@given(st.integers(min_value=0, max_value=len(SMALL) - 65), st.integers(0, 255))
def test_any_damage_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, at: int, byte: int
) -> None:
    damaged = SMALL[:at] + bytes([byte]) + SMALL[at + 1 :]
    try:
        file = read(tmp_path_factory.mktemp("damaged"), damaged)
    except ShoalError:
        return
    assert all(t.offset + t.bytes <= len(damaged) for t in file.tensors.values())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04" + bytes(100),
        b"GGUF" + struct.pack("<IQQ", 9, 0, 0),
        b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60),
        gguf([text("x") + struct.pack("<IQ", 8, 1 << 60)], [], b""),
        gguf([text("x") + struct.pack("<IIQ", 9, 4, 1 << 60)], [], b""),
        gguf([text("x") + struct.pack("<IIQ", 9, 9, 1)], [], b""),
        gguf([number_entry("general.alignment", 7)], [], b""),
        gguf([], [("a", (4,), 0, 1 << 40)], bytes(32)),
        gguf([], [("a", (1 << 40, 1 << 40), 0, 0)], bytes(32)),
        gguf([], [("a", (4,), 0, 0), ("a", (4,), 0, 32)], bytes(64)),
        gguf([], [("a", (4,), 0, 0), ("b", (4,), 0, 0)], bytes(64)),
    ],
    ids=lambda content: str(len(content)),
)
def test_lies_are_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(UnsupportedModel):
        read(tmp_path, content)


def test_a_file_that_is_not_there_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        read_gguf(tmp_path / "none.gguf")


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    file = read(tmp_path, SMALL)
    out = io.BytesIO()
    parts = [Part("zeros", None, (3, 2)), Part("c", "b"), Part("a", "a")]
    write_gguf(out, file, [*file.raw.values(), text_entry("more", "ü")], parts)
    again = read(tmp_path, out.getvalue())
    assert again.entries == {**file.entries, "more": "ü"}
    held = {n: out.getvalue()[t.offset :][: t.bytes] for n, t in again.tensors.items()}
    assert held["c"] == bytes(range(32, 64))
    assert held["a"] == bytes(range(32))
    assert held["zeros"] == bytes(32)


def test_a_checkpoint_answers_as_its_folder_would(tiny: GgufCheckpoint) -> None:
    assert (tiny.name, tiny.model_type, tiny.layers, tiny.hidden_size) == ("tiny", "llama", 8, 256)
    assert (tiny.vocab_size, tiny.context_length, tiny.tied) == (4096, 1024, True)
    assert sum(tiny.layer_bytes) < tiny.slice_bytes(tiny.whole) <= tiny.gguf.path.stat().st_size
    assert open_gguf(tiny.gguf.path).model_id == tiny.model_id


def test_a_slice_has_its_blocks_from_0_and_no_vocabulary(
    tiny: GgufCheckpoint, tmp_path: Path
) -> None:
    path = tmp_path / "slice.gguf"
    with path.open("wb") as out:
        tiny.write_slice(Slice(3, 5), out)
    part = read_gguf(path)
    blocks = {name.split(".")[1] for name in part.tensors if name.startswith("blk.")}
    assert blocks == {"0", "1"}
    assert part.entries["llama.block_count"] == 2
    assert part.entries["tokenizer.ggml.model"] == "none"
    assert part.tensors["token_embd.weight"].dimensions == (256, 1)
    old, new = tiny.gguf.tensors["blk.4.ffn_up.weight"], part.tensors["blk.1.ffn_up.weight"]
    whole = tiny.gguf.path.read_bytes()
    assert path.read_bytes()[new.offset :][: new.bytes] == whole[old.offset :][: old.bytes]


def test_one_changed_weight_makes_another_model(tiny: GgufCheckpoint, tmp_path: Path) -> None:
    content = bytearray(tiny.gguf.path.read_bytes())
    content[tiny.gguf.tensors["blk.4.ffn_up.weight"].offset] ^= 1
    (tmp_path / "tiny.gguf").write_bytes(content)
    assert open_gguf(tmp_path / "tiny.gguf").model_id != tiny.model_id


def test_families_that_were_not_proved_are_refused(tiny: GgufCheckpoint, tmp_path: Path) -> None:
    content = tiny.gguf.path.read_bytes().replace(text("llama"), text("gemma"), 1)
    (tmp_path / "g.gguf").write_bytes(content)
    with pytest.raises(UnsupportedModel, match="known to survive slicing"):
        open_gguf(tmp_path / "g.gguf")


def test_a_missing_block_is_noticed(tiny: GgufCheckpoint, tmp_path: Path) -> None:
    content = tiny.gguf.path.read_bytes()
    content = content.replace(text("blk.7.attn_q.weight"), text("blk.9.attn_q.weight"))
    (tmp_path / "g.gguf").write_bytes(content)
    with pytest.raises(UnsupportedModel, match="all alike"):
        open_gguf(tmp_path / "g.gguf")
