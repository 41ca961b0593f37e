import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from shoal.errors import ModelNotFound, UnsupportedModel
from shoal.models.checkpoint import INDEX_FILE, SINGLE_FILE, is_hub_id, open_checkpoint
from shoal.units import Slice

FolderOf = Callable[[str], Path]


@pytest.fixture
def copy(folder_of: FolderOf, tmp_path: Path) -> Path:
    """A llama checkpoint that a test may spoil."""
    return Path(shutil.copytree(folder_of("llama"), tmp_path / "llama"))


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_index(folder: Path, **changes: str) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    index["weight_map"].update(changes)
    (folder / INDEX_FILE).write_text(json.dumps(index))


def test_a_folder_tells_what_placement_and_gateway_need(folder_of: FolderOf) -> None:
    checkpoint = open_checkpoint(str(folder_of("llama")))
    assert checkpoint.name == folder_of("llama").name
    assert (checkpoint.model_type, checkpoint.layers, checkpoint.hidden_size) == ("llama", 4, 64)
    assert (checkpoint.vocab_size, checkpoint.context_length) == (211, 512)
    assert checkpoint.dtype == "f32"
    assert len(checkpoint.model_id) == 16


def test_the_sizes_of_slices_add_up_to_the_file(folder_of: FolderOf) -> None:
    checkpoint = open_checkpoint(str(folder_of("llama")))
    every = sum(info.bytes for info in checkpoint.tensors.values())
    parts = [checkpoint.slice_bytes(Slice(start, start + 1)) for start in range(4)]
    assert sum(parts) == checkpoint.slice_bytes(checkpoint.whole) == every
    assert parts[1] == checkpoint.layer_bytes[1]
    assert parts[0] - checkpoint.layer_bytes[0] == 211 * 64 * 4  # the embedding


def test_a_tied_model_needs_its_embedding_at_both_ends(folder_of: FolderOf) -> None:
    checkpoint = open_checkpoint(str(folder_of("llama-tied")))
    assert checkpoint.tied
    for layers in (Slice(0, 1), Slice(3, 4)):
        assert "model.embed_tokens.weight" in checkpoint.own(layers)
    assert "model.embed_tokens.weight" not in checkpoint.own(Slice(1, 3))


def test_layers_beyond_the_last_are_nobodys(copy: Path) -> None:
    change_config(copy, num_hidden_layers=3)
    checkpoint = open_checkpoint(str(copy))
    assert not any("layers.3." in name for name in checkpoint.own(checkpoint.whole))
    assert len(checkpoint.layer_bytes) == 3


def test_layers_that_predict_several_tokens_are_nobodys(copy: Path) -> None:
    before = open_checkpoint(str(copy))
    name = "mtp.layers.0.mlp.up_proj.weight"
    save_file({name: torch.zeros(4, 4)}, copy / "mtp.safetensors")
    change_index(copy, **{name: "mtp.safetensors"})
    checkpoint = open_checkpoint(str(copy))
    assert name in checkpoint.tensors
    assert checkpoint.own(checkpoint.whole).keys() == before.tensors.keys()
    assert checkpoint.layer_bytes == before.layer_bytes
    assert checkpoint.counts == before.counts


def test_the_same_files_have_the_same_fingerprint_and_others_another(copy: Path) -> None:
    before = open_checkpoint(str(copy)).model_id
    twin = shutil.copytree(copy, copy.parent / "twin")
    change_config(twin, _name_or_path="elsewhere", transformers_version="4.0")
    assert open_checkpoint(str(twin)).model_id == before
    change_config(twin, rope_theta=77.0)
    assert open_checkpoint(str(twin)).model_id != before


@pytest.mark.parametrize("where", ["weights", "tokenizer"])
def test_other_weights_or_another_tokenizer_are_another_model(copy: Path, where: str) -> None:
    before = open_checkpoint(str(copy))
    if where == "tokenizer":
        (copy / "tokenizer.json").write_text("{}")
    else:
        info = before.tensors["model.layers.2.mlp.up_proj.weight"]
        with (copy / info.file).open("r+b") as file:
            file.seek(info.offset)
            file.write(b"\x01\x02\x03\x04")
    assert open_checkpoint(str(copy)).model_id != before.model_id


def test_a_context_ends_where_the_rotary_scaling_would_switch(copy: Path) -> None:
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 128}
    change_config(copy, rope_scaling=rope)
    assert open_checkpoint(str(copy)).context_length == 128


@pytest.mark.parametrize(
    ("named", "expected"), [("bfloat16", "bf16"), ("float16", "f16"), ("auto", "f32")]
)
def test_the_type_is_what_the_config_says_else_what_the_weights_are(
    copy: Path, named: str, expected: str
) -> None:
    change_config(copy, dtype=named)
    assert open_checkpoint(str(copy)).dtype == expected


def test_a_method_that_is_not_read_is_refused_with_a_way_out(copy: Path) -> None:
    change_config(copy, quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(UnsupportedModel, match=r"quantised \(bitsandbytes\)") as refusal:
        open_checkpoint(str(copy))
    assert "--quant int8" in refusal.value.hint


def test_gpt2_is_refused_by_what_its_config_lacks(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_layer": 12, "n_embd": 768}')
    with pytest.raises(UnsupportedModel, match="no num_hidden_layers, hidden_size"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("name", ["no-such-model", "/no/such/folder", "../x/y", "a/b/c", ""])
def test_an_unknown_name_says_what_a_name_may_be(name: str) -> None:
    with pytest.raises(ModelNotFound) as refusal:
        open_checkpoint(name or "\0")
    assert refusal.value.hint


def test_a_hub_id_has_one_slash_and_no_dots_in_front() -> None:
    assert is_hub_id("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert not any(map(is_hub_id, ("shoal-tiny", "./a", "../a", "a/../b", "/a/b", "a/b/c")))


def test_pickled_weights_are_never_read(copy: Path) -> None:
    (copy / INDEX_FILE).unlink()
    (copy / "pytest_model.bin").write_bytes(b"")
    with pytest.raises(ModelNotFound) as refusal:
        open_checkpoint(str(copy))
    assert "never pickle" in refusal.value.hint


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", "..safetensors"]
)
def test_an_index_cannot_name_files_elsewhere(copy: Path, file: str) -> None:
    change_index(copy, more=file)
    with pytest.raises(UnsupportedModel, match="no plain safetensors file"):
        open_checkpoint(str(copy))


def test_a_missing_part_is_named(copy: Path) -> None:
    part = sorted(copy.glob("*.safetensors"))[1]
    part.unlink()
    with pytest.raises(ModelNotFound, match=part.name):
        open_checkpoint(str(copy))


def test_an_index_that_promises_too_much_is_refused(copy: Path) -> None:
    change_index(copy, more=sorted(copy.glob("*.safetensors"))[0].name)
    with pytest.raises(UnsupportedModel, match="lacks tensors that the index promises"):
        open_checkpoint(str(copy))


@pytest.mark.parametrize("spoilt", ["{", "[]", '{"a": 1, ' * 30_000])
@pytest.mark.parametrize("file", ["config.json", INDEX_FILE])
def test_json_that_does_not_decode_is_refused(copy: Path, file: str, spoilt: str) -> None:
    (copy / file).write_text(spoilt)
    with pytest.raises(UnsupportedModel):
        open_checkpoint(str(copy))


def test_a_single_file_needs_no_index(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = {}
    for part in sorted(copy.glob("*.safetensors")):
        tensors.update(load_file(part))
        part.unlink()
    (copy / INDEX_FILE).unlink()
    save_file(tensors, copy / SINGLE_FILE)
    assert set(open_checkpoint(str(copy)).tensors) == set(tensors)


def test_opening_a_checkpoint_needs_no_torch() -> None:
    code = "import sys, shoal.models.checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
