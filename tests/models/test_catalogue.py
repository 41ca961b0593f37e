"""What this machine can open, and when it reads what."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.errors import UnsupportedModel
from shoal.models.catalogue import Catalogue
from shoal.models.checkpoint import BUILTIN
from shoal.models.random_checkpoint import write_random_checkpoint
from shoal.models.text import Tokenizer
from tests.models.families import DENSE


def test_what_the_user_asked_for_comes_with_its_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue = Catalogue()
    checkpoint = catalogue.add(BUILTIN)
    monkeypatch.setattr(Tokenizer, "open", None)  # from here on nothing large is read
    assert catalogue.known(BUILTIN) is checkpoint
    assert catalogue.tokenizer(checkpoint).decode([]) == ""


def test_layers_can_be_served_without_a_tokenizer(tmp_path: Path) -> None:
    write_random_checkpoint(DENSE["llama"], tmp_path)
    catalogue = Catalogue()
    checkpoint = catalogue.add(str(tmp_path))
    with pytest.raises(UnsupportedModel, match=r"tokenizer\.json"):
        catalogue.tokenizer(checkpoint)


def test_a_name_that_a_peer_speaks_of_is_no_path_to_a_gguf_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shoal.models.catalogue.is_cached", lambda name: True)
    catalogue = Catalogue()
    monkeypatch.setattr(
        "shoal.models.catalogue.open_checkpoint", lambda *_, **__: pytest.fail("opened")
    )
    assert catalogue.known("org/x.gguf") is None
