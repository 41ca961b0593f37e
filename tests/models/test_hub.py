"""The hub, played by a folder: what is asked of its client, and what its failures become."""

import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub import errors

from shoal.errors import ModelNotFound
from shoal.models.checkpoint import open_checkpoint
from shoal.models.safetensors_header import read_header
from shoal.models.slice import load_slice
from shoal.units import Slice

FolderOf = Callable[[str], Path]
REPO = "someone/llama"


class Hub:
    """Copies files into a snapshot folder named after the commit, as the real client does."""

    def __init__(self, source: Path, cache: Path) -> None:
        self.source, self.snapshot = source, cache / "c0ffee"
        self.fetched: list[str] = []

    def snapshot_download(
        self, repo: str, *, allow_patterns: list[str], local_files_only: bool, **_: Any
    ) -> str:
        assert repo == REPO
        self.snapshot.mkdir(exist_ok=True)
        for path in sorted(self.source.iterdir()):
            wanted = any(fnmatch(path.name, pattern) for pattern in allow_patterns)
            if wanted and not local_files_only and not (self.snapshot / path.name).exists():
                shutil.copy(path, self.snapshot)
                self.fetched.append(path.name)
        return str(self.snapshot)

    def get_safetensors_metadata(self, repo: str, *, revision: str) -> Any:
        assert revision == "c0ffee"
        files = {}
        for path in self.source.glob("*.safetensors"):
            tensors = {
                name: SimpleNamespace(
                    dtype=info.dtype, shape=list(info.shape), data_offsets=(0, info.bytes)
                )
                for name, info in read_header(path).items()
            }
            files[path.name] = SimpleNamespace(tensors=tensors)
        return SimpleNamespace(files_metadata=files)


@pytest.fixture
def hub(folder_of: FolderOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    played = Hub(folder_of("llama"), tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", played.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: played)
    return played


def test_opening_fetches_no_weights_and_a_slice_only_its_own_files(hub: Hub) -> None:
    checkpoint = open_checkpoint(REPO)
    assert "config.json" in hub.fetched
    assert not any(name.endswith(".safetensors") for name in hub.fetched)
    load_slice(checkpoint, Slice(1, 2))
    own = {info.file for info in checkpoint.own(Slice(1, 2)).values()}
    assert {name for name in hub.fetched if name.endswith(".safetensors")} == own
    assert len(own) < len({info.file for info in checkpoint.tensors.values()})


def test_sizes_are_known_before_the_download(hub: Hub) -> None:
    local = open_checkpoint(str(hub.source))
    remote = open_checkpoint(REPO)
    assert remote.layer_bytes == local.layer_bytes
    assert remote.slice_bytes(Slice(0, 2)) == local.slice_bytes(Slice(0, 2))


def test_the_fingerprint_is_the_same_before_and_after_the_download(hub: Hub) -> None:
    before = open_checkpoint(REPO)
    load_slice(before, before.whole)
    assert open_checkpoint(REPO, download=False).model_id == before.model_id


@pytest.mark.parametrize(
    ("failure", "says", "hint"),
    [
        (errors.LocalEntryNotFoundError("offline"), "does not answer", "HF_HUB_OFFLINE"),
        (httpx.ConnectError("no route"), "does not answer", "local directory"),
        (errors.HFValidationError("bad name"), "no model 'someone/llama'", "spelling"),
    ],
)
def test_the_hubs_failures_say_what_to_do(
    monkeypatch: pytest.MonkeyPatch, failure: Exception, says: str, hint: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelNotFound, match=says) as refusal:
        open_checkpoint(REPO)
    assert hint in refusal.value.hint


@pytest.mark.parametrize(
    ("kind", "says"),
    [(errors.GatedRepoError, "licence"), (errors.RepositoryNotFoundError, "may read")],
)
def test_a_closed_door_is_named(
    monkeypatch: pytest.MonkeyPatch, kind: type[errors.HfHubHTTPError], says: str
) -> None:
    response = httpx.Response(403, request=httpx.Request("GET", "https://hub.example"))

    def fail(*_: Any, **__: Any) -> None:
        raise kind("no", response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelNotFound, match=says):
        open_checkpoint(REPO)
