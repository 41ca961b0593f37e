"""`shoal show`: what is told of a model before any of it is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.models.checkpoint import BUILTIN_FOLDER
from tests.needs import needs

from .conftest import Shoal


def columns(line: str) -> list[str]:
    return [cell for cell in line.split("  ") if cell.strip()]


def test_it_tells_what_the_model_is_and_what_each_kind_of_weights_takes(shoal: Shoal) -> None:
    result = shoal("show", "shoal-tiny", asks=False)
    assert result.exit_code == 0
    head, stored, *_ = lines = result.stdout.splitlines()
    assert "llama · 8 layers · 5.4 million parameters · context of 1024 tokens" in head
    assert "11 MB, weights in floats" in stored
    none, _, int4, *_ = found = [columns(line) for line in lines[-5:]]
    assert [cells[0] for cells in found] == ["none", "int8", "int4", "w8", "w4"]
    assert none[1].strip() == "1.1 MB"
    assert none[3].strip() == "is the embedding"
    assert int4[1].strip() == "296 kB"


def test_the_sums_are_there_for_programs(shoal: Shoal) -> None:
    shown = json.loads(shoal("show", "shoal-tiny", "--json", asks=False).stdout)
    assert (shown["architecture"], shown["layers"], shown["dtype"]) == ("llama", 8, "bf16")
    assert shown["stored"]["dequantised"] == {}
    none, int8, int4, w8, w4 = shown["memory"]
    assert none["whole"] == shown["stored"]["bytes"] == 2 * shown["parameters"]
    for one in shown["memory"]:
        ends = one["head"] + (0 if one["tied"] else one["embedding"])
        assert one["whole"] == sum(one["layers"]) + ends
    assert none["whole"] > int8["whole"] > w8["whole"] > w4["whole"] > int4["whole"]
    wide = json.loads(shoal("show", "shoal-tiny", "--dtype", "f32", "--json", asks=False).stdout)
    assert wide["memory"][0]["whole"] == 2 * none["whole"]


def published(folder: Path, quantization: dict[str, object]) -> str:
    for name in ("model.safetensors", "model.safetensors.index.json"):
        if (BUILTIN_FOLDER / name).exists():
            (folder / name).symlink_to(BUILTIN_FOLDER / name)
    config = json.loads((BUILTIN_FOLDER / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    return str(folder)


def test_how_it_is_stored_is_told_beside_what_becomes_of_it(shoal: Shoal, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(BUILTIN_FOLDER / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[f"{name}_scale"] = torch.ones(1)
    model = published(tmp_path, {"quant_method": "fp8"})
    (tmp_path / "model.safetensors").unlink()
    save_file(tensors, tmp_path / "model.safetensors")
    stored, read = shoal("show", model, asks=False).stdout.splitlines()[1:3]
    assert f"by fp8: 1 as FP8, {len(tensors) - 2} in floats" in stored
    assert "as bf16" in read


def test_what_cannot_be_read_is_refused_with_a_way_out(shoal: Shoal, tmp_path: Path) -> None:
    model = published(tmp_path, {"quant_method": "bitsandbytes"})
    result = shoal("show", model, asks=False)
    assert result.exit_code == 1
    assert "(bitsandbytes)" in result.stderr
    assert "--quant int8" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code"), [(["no/such/model/x"], 1), (["shoal-tiny", "--dtype", "f64"], 2)]
)
def test_what_cannot_be_asked_is_refused(shoal: Shoal, arguments: list[str], code: int) -> None:
    result = shoal("show", *arguments, asks=False)
    assert result.exit_code == code
    assert "try:" in result.stderr


def test_no_engine_is_needed() -> None:
    listing = (
        "import sys; from shoal.cli.show import show; show('shoal-tiny');"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True)
    assert found.stdout.splitlines()[-1] == "[]"


def test_a_gguf_file_is_shown_as_it_is_packed(shoal: Shoal, tmp_path: Path) -> None:
    needs("gguf")
    from tests.gguf_files import write_gguf

    packed = write_gguf(BUILTIN_FOLDER, tmp_path / "tiny.gguf")
    lines = shoal("show", str(packed), asks=False).stdout.splitlines()
    assert "as a GGUF file" in lines[1]
    assert columns(lines[-1])[0] == "none"


def test_layers_with_a_running_state_are_told_and_add_nothing_to_the_cache(
    shoal: Shoal, tmp_path: Path
) -> None:
    from shoal.models.random_checkpoint import write_random_checkpoint
    from tests.models.families import HYBRIDS

    write_random_checkpoint(HYBRIDS["qwen3_next"], tmp_path)
    told = shoal("show", str(tmp_path), asks=False).stdout
    assert "3 layers keep a running state" in told
    shown = json.loads(shoal("show", str(tmp_path), "--json", asks=False).stdout)
    assert shown["memory"][0]["cache_per_1000_tokens"] == 1000 * 2 * 2 * 16 * 4  # of one layer
    assert "running state" not in shoal("show", "shoal-tiny", asks=False).stdout
