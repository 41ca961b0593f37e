"""The checkpoints that this machine can open, by the name under which the mesh speaks of them."""

from __future__ import annotations

from contextlib import suppress

from ..errors import ModelNotFound, ShoalError
from ..units import ModelId
from .checkpoint import (
    BUILTIN,
    GGUF,
    Checkpoint,
    is_hub_id,
    open_checkpoint,
    open_without_weights,
)
from .hub import is_cached
from .text import Tokenizer

MAX_ABSENT = 4096  # names of models that are not here, remembered so as not to look again


class Catalogue:
    """Opens each checkpoint once. A name that a peer speaks of is never a path and never starts a
    download.
    """

    def __init__(self) -> None:
        self._open: dict[str, Checkpoint] = {}
        self._absent: set[str] = set()
        self._tokenizers: dict[ModelId, Tokenizer] = {}

    def add(self, name_or_path: str) -> Checkpoint:
        """What our own user asked for: a folder, a hub id (downloaded when needed) or the built-in
        model. Call it in a thread: the tokenizer is read with it, and a large one takes a third of
        a second or more, as long as neighbours wait for a heartbeat.
        """
        checkpoint = self._keep(open_checkpoint(name_or_path))
        with suppress(ShoalError):  # layers can be served without one; who asks for it is told
            self.tokenizer(checkpoint)
        return checkpoint

    def add_without_weights(self, name_or_path: str) -> Checkpoint:
        """The same where another engine computes. Raises UnsupportedModel without a tokenizer."""
        checkpoint = self._keep(open_without_weights(name_or_path))
        self.tokenizer(checkpoint)
        return checkpoint

    def get(self, name: str) -> Checkpoint | None:
        """The checkpoint of this name if it was opened already: no file is touched."""
        return self._open.get(name)

    def known(self, name: str) -> Checkpoint | None:
        """The checkpoint of this name when its files are here, else None. Call it in a thread."""
        if name not in self._open and name not in self._absent and not name.endswith(GGUF):
            try:
                if name != BUILTIN and not (is_hub_id(name) and is_cached(name)):
                    raise ModelNotFound(f"{name} is not on this machine")
                checkpoint = open_checkpoint(name, download=False)
                with suppress(ShoalError):
                    self.tokenizer(checkpoint)
                self._keep(checkpoint)
            except (ShoalError, OSError):  # also files in our cache that we may not read
                if len(self._absent) >= MAX_ABSENT:
                    self._absent.clear()  # looking again costs little, and names come without end
                self._absent.add(name)
        return self._open.get(name)

    def _keep(self, checkpoint: Checkpoint) -> Checkpoint:
        self._open[checkpoint.name] = checkpoint
        return checkpoint

    def tokenizer(self, checkpoint: Checkpoint) -> Tokenizer:
        """Raises UnsupportedModel when the checkpoint has none that we can read."""
        model = checkpoint.model_id
        if model not in self._tokenizers:
            self._tokenizers[model] = checkpoint.open_tokenizer()
        return self._tokenizers[model]
