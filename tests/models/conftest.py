from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.models.checkpoint import Checkpoint, open_checkpoint
from shoal.models.random_checkpoint import write_random_checkpoint

from .families import EVERY
from .published.writers import CASES, write

Pair = tuple[Checkpoint, Checkpoint]  # quantised, and in floats what it stands for


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family -> a folder with its tiny checkpoint; written once, not to be changed."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            write_random_checkpoint(EVERY[family], made[family])
        return made[family]

    return get


@pytest.fixture(scope="session")
def pair_of(
    folder_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Pair]:
    """The case's two checkpoints; written once, not to be changed."""
    made: dict[str, Pair] = {}

    def get(name: str) -> Pair:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            quantised, plain = folder / "quantised", folder / "plain"
            write(CASES[name], folder_of(CASES[name].family), quantised, plain)
            made[name] = open_checkpoint(str(quantised)), open_checkpoint(str(plain))
        return made[name]

    return get
