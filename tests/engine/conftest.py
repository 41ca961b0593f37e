from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.models.checkpoint import Checkpoint, open_checkpoint
from shoal.models.random_checkpoint import write_random_checkpoint

from ..models.families import EVERY


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Checkpoint, Any]]:
    """family -> its tiny checkpoint, written once, and transformers' own model of it."""
    made: dict[str, tuple[Checkpoint, Any]] = {}

    def get(family: str) -> tuple[Checkpoint, Any]:
        if family not in made:
            folder: Path = tmp_path_factory.mktemp(family)
            reference = write_random_checkpoint(EVERY[family], folder)
            made[family] = open_checkpoint(str(folder)), reference
        return made[family]

    return get
