import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shoal.errors import UnsupportedModel
from shoal.models.safetensors_header import TensorInfo, read_header
from shoal.models.safetensors_read import TYPES, read_tensor


@pytest.mark.parametrize("dtype", TYPES.values())
def test_every_type_is_read_as_it_was_written(tmp_path: Path, dtype: torch.dtype) -> None:
    bits = torch.randint(0, 2, (6, 40), dtype=torch.uint8)
    written = {"a": bits.view(dtype), "empty": bits[:0].view(dtype), "one": bits.view(dtype)[0, 0]}
    save_file({name: x.clone() for name, x in written.items()}, tmp_path / "x.safetensors")
    for name, info in read_header(tmp_path / "x.safetensors").items():
        found = read_tensor(tmp_path, info)
        assert (found.dtype, found.shape) == (dtype, written[name].shape)
        as_bytes = (x.reshape(-1).view(torch.uint8) for x in (found, written[name]))
        assert torch.equal(*as_bytes)


def test_the_memory_is_our_own(tmp_path: Path) -> None:
    """Whoever overwrites the file or cuts it off does not change a model that runs."""
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.arange(1000.0)}, path)
    info = read_header(path)["a"]
    found = read_tensor(tmp_path, info)
    os.truncate(path, info.offset + 8)
    assert torch.equal(found, torch.arange(1000.0))
    with pytest.raises(UnsupportedModel, match="became shorter"):
        read_tensor(tmp_path, info)


def test_types_that_torch_lacks_are_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="F4"):
        read_tensor(tmp_path, TensorInfo("x.safetensors", "F4", (2,), 1, 8))
