import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from shoal.errors import InvalidRequest, ModelNotFound, UnsupportedModel
from shoal.models.checkpoint import open_checkpoint
from shoal.models.skeleton import PassThrough
from shoal.models.slice import load_slice
from shoal.units import Slice

from .families import FAMILIES
from .reads import places, record_reads

FolderOf = Callable[[str], Path]


@pytest.fixture
def copy(folder_of: FolderOf, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder_of("llama"), tmp_path / "llama"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_slice_holds_its_layers_and_nothing_of_the_others(
    folder_of: FolderOf, family: str
) -> None:
    checkpoint = open_checkpoint(str(folder_of(family)))
    model = load_slice(checkpoint, Slice(1, 3))
    own = checkpoint.slice_bytes(Slice(1, 3))
    assert own <= model.nbytes < own * 1.01  # rotary frequencies are computed, not stored
    kinds = [isinstance(layer, PassThrough) for layer in model.model.model.layers]
    assert kinds == [True, False, False, True]
    assert (model.first, model.last, model.training) == (False, False, False)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_files_of_other_stages_are_not_touched(copy: Path) -> None:
    checkpoint = open_checkpoint(str(copy))
    own = {info.file for info in checkpoint.own(Slice(1, 2)).values()}
    foreign = {info.file for info in checkpoint.tensors.values()} - own
    assert len(foreign) > 2
    for file in foreign:
        (copy / file).unlink()
    load_slice(checkpoint, Slice(1, 2))
    with pytest.raises(ModelNotFound, match=min(foreign)):
        load_slice(checkpoint, Slice(0, 4))


def test_of_a_shared_file_only_own_tensors_are_read(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = record_reads(monkeypatch)
    checkpoint = open_checkpoint(str(copy))
    load_slice(checkpoint, Slice(2, 4))
    assert sorted(asked) == places(checkpoint.own(Slice(2, 4)).values())
    assert 0 < len(asked) < len(checkpoint.tensors)


def test_a_tied_head_is_the_embedding(folder_of: FolderOf) -> None:
    checkpoint = open_checkpoint(str(folder_of("llama-tied")))
    last = load_slice(checkpoint, Slice(3, 4)).model
    assert last.lm_head.weight is last.model.embed_tokens.weight
    assert not isinstance(load_slice(checkpoint, Slice(0, 1)).model.lm_head, torch.nn.Linear)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_the_type_can_be_chosen(folder_of: FolderOf, dtype: str) -> None:
    model = load_slice(open_checkpoint(str(folder_of("llama"))), Slice(0, 2), dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {model.dtype}
    assert model.compute == model.dtype_name == dtype


def test_what_must_stay_float32_stays_so(folder_of: FolderOf) -> None:
    """deepseek_v3 keeps its router's correction in float32 in every type."""
    model = load_slice(open_checkpoint(str(folder_of("deepseek_v3"))), Slice(1, 2), "bf16")
    biases = [x for name, x in model.model.named_buffers() if "correction_bias" in name]
    assert [bias.dtype for bias in biases] == [torch.float32]


def test_int8_replaces_every_linear(folder_of: FolderOf) -> None:
    model = load_slice(open_checkpoint(str(folder_of("llama"))), Slice(2, 4), quant="int8")
    assert model.compute == "int8"
    assert not any(type(module) is torch.nn.Linear for module in model.modules())


@pytest.mark.parametrize(
    ("layers", "dtype"), [(Slice(2, 5), None), (Slice(0, 1), "f64"), (Slice(0, 1), "")]
)
def test_what_cannot_be_asked_is_refused(
    folder_of: FolderOf, layers: Slice, dtype: str | None
) -> None:
    checkpoint = open_checkpoint(str(folder_of("llama")))
    if dtype == "":
        assert load_slice(checkpoint, layers, dtype).dtype_name == "f32"
        return
    with pytest.raises(InvalidRequest):
        load_slice(checkpoint, layers, dtype)


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The checkpoint as a single file, changed."""
    tensors: dict[str, Any] = {}
    for part in folder.glob("*.safetensors"):
        tensors.update(load_file(part))
        part.unlink()
    (folder / "model.safetensors.index.json").unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda tensors: tensors.pop(NORM), f"no {NORM}"),
        (lambda tensors: tensors.update({NORM: torch.ones(65)}), f"a wrong shape of {NORM}"),
        (
            lambda tensors: tensors.update({"model.layers.1.extra.weight": torch.ones(3)}),
            "a left-over model.layers.1.extra.weight",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    copy: Path, change: Callable[[dict[str, Any]], None], why: str
) -> None:
    checkpoint = open_checkpoint(str(rewritten(copy, change)))
    with pytest.raises(UnsupportedModel, match=why):
        load_slice(checkpoint, Slice(1, 2))
    load_slice(checkpoint, Slice(2, 3))


def test_leftovers_that_transformers_ignores_are_ignored(copy: Path) -> None:
    """Old llama checkpoints carry the rotary frequencies of each layer."""
    old = {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    load_slice(
        open_checkpoint(str(rewritten(copy, lambda tensors: tensors.update(old)))), Slice(0, 4)
    )


def test_code_in_a_checkpoint_is_not_run(copy: Path) -> None:
    (copy / "modeling_evil.py").write_text("raise SystemExit('executed')")
    path = copy / "config.json"
    config = json.loads(path.read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "x.Y"}
    path.write_text(json.dumps(config))
    load_slice(open_checkpoint(str(copy)), Slice(0, 1))


def test_loading_leaves_transformers_own_settings_alone(folder_of: FolderOf) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_slice(open_checkpoint(str(folder_of("llama"))), Slice(0, 1))
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert transformers.__version__.startswith("5.")
