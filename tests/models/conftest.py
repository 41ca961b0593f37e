from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.models.random_checkpoint import write_random_checkpoint

from .families import FAMILIES


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family -> a folder with its tiny checkpoint; written once, not to be changed."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            write_random_checkpoint(FAMILIES[family], made[family])
        return made[family]

    return get
