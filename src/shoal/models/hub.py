"""Checkpoints of the Hugging Face hub, through its own client and cache.

`HF_HOME`, `HF_TOKEN`, `HF_HUB_OFFLINE` and an existing cache are honoured because the client
honours them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import ModelNotFound
from .safetensors_header import DTYPE_BYTES, TensorInfo

SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "chat_template*",
)


def is_cached(repo: str) -> bool:
    """Is anything of this repository here? No question is sent to the hub."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repo, "config.json"), str)


def fetch(
    repo: str, files: Iterable[str], revision: str | None = None, *, download: bool = True
) -> Path:
    """Have these files (or patterns) in the cache; returns the snapshot's folder, whose name is
    the commit.
    """
    from huggingface_hub import snapshot_download

    with _explained(repo):
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=list(files),
                local_files_only=not download,
            )
        )


def remote_tensors(repo: str, revision: str) -> dict[str, TensorInfo]:
    """The tensor table of a checkpoint whose files are not here yet: a few range requests for each
    file.
    """
    from huggingface_hub import HfApi

    with _explained(repo):
        files = HfApi().get_safetensors_metadata(repo, revision=revision).files_metadata
    return {
        name: _info(file, tensor.dtype, tuple(tensor.shape), tensor.data_offsets)
        for file, metadata in files.items()
        for name, tensor in metadata.tensors.items()
    }


def _info(file: str, dtype: str, shape: tuple[int, ...], offsets: tuple[int, int]) -> TensorInfo:
    """`offset` stays 0: it is known once the file is here, and read again then."""
    known = DTYPE_BYTES.get(dtype, 0)
    return TensorInfo(file, dtype, shape, offsets[1] - offsets[0] if known else 0, 0)


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    from httpx import HTTPError
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise ModelNotFound(
            f"{repo} wants its licence accepted first",
            hint=f"accept it at https://huggingface.co/{repo} and set HF_TOKEN",
        ) from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError):
        raise ModelNotFound(
            f"the hub has no model {repo!r} that we may read",
            hint="check the spelling (ORGANISATION/NAME), or set HF_TOKEN if it is private",
        ) from None
    except errors.NotASafetensorsRepoError:
        raise ModelNotFound(
            f"{repo} has no safetensors files, and nothing else is read",
            hint="choose a repository with .safetensors files",
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, HTTPError, OSError) as why:
        raise ModelNotFound(
            f"{repo} is not in the local cache, and the hub does not answer ({type(why).__name__})",
            hint="go online, unset HF_HUB_OFFLINE, or give a local directory",
        ) from None
