"""What we use of llama.cpp's C interface, through the ctypes of llama-cpp-python; `engine/gguf.py`
says what for.

T tokens of a batch · E hidden width · V vocabulary
"""

# ruff: noqa: N803, N806 - the letters at the end of an array's name are its axes

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from weakref import finalize

import numpy as np
import numpy.typing as npt

from ..errors import EngineMissing, NoCapacity, UnsupportedModel

Floats = npt.NDArray[np.float32]
HINT = 'install it with: pip install "shoal[engine,gguf]" (it compiles llama.cpp: some minutes)'


@dataclass(kw_only=True, frozen=True, slots=True)
class ContextSize:
    tokens: int  # of the cache, all sessions together
    sessions: int
    batch_tokens: int
    threads: int


@cache
def llama_library() -> LlamaLibrary:
    """The one of this process: it keeps what llama.cpp may call. Raises EngineMissing."""
    return LlamaLibrary()


class LlamaLibrary:
    """llama.cpp, set up once and silent."""

    def __init__(self) -> None:
        try:
            import llama_cpp
            from llama_cpp._ggml import libggml
        except (ImportError, OSError, RuntimeError) as error:
            raise EngineMissing(f"llama-cpp-python cannot be used: {error}", hint=HINT) from error
        self.api: Any = llama_cpp
        self.ggml: Any = libggml
        self._declare()
        self._silent = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._silent, None)
        llama_cpp.llama_backend_init()

    def _declare(self) -> None:
        size, pointer = ctypes.c_size_t, ctypes.c_void_p
        for name, result, arguments in (
            ("ggml_get_name", ctypes.c_char_p, [pointer]),
            ("ggml_nbytes", size, [pointer]),
            ("ggml_backend_tensor_get", None, [pointer, pointer, size, size]),
            ("ggml_row_size", size, [ctypes.c_int, ctypes.c_int64]),
            ("ggml_get_type_traits", ctypes.POINTER(_TypeTraits), [ctypes.c_int]),
        ):
            function = getattr(self.ggml, name)
            function.restype, function.argtypes = result, arguments

    def floats_of(self, tensor: int) -> Floats:
        """A copy of a tensor of f32, wherever it lies."""
        found = np.empty(self.ggml.ggml_nbytes(tensor) // 4, np.float32)
        self.ggml.ggml_backend_tensor_get(tensor, found.ctypes.data, 0, found.nbytes)
        return found


_ToFloat = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class _TypeTraits(ctypes.Structure):
    """The beginning of `ggml_type_traits`: ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", _ToFloat),
    )


class Embedding:
    """Rows of a matrix, as they are asked for, unpacked by ggml's own function: read from the file
    where it lies, never as a whole. (A mapped file that somebody shortens would end the process.)
    `close` it; garbage collection does it too.
    """

    def __init__(
        self, library: LlamaLibrary, path: Path, offset: int, kind: int, width: int
    ) -> None:
        self._row_bytes: int = library.ggml.ggml_row_size(kind, width)
        self._offset, self._width = offset, width
        self._file = path.open("rb", buffering=0)
        self.close = finalize(self, self._file.close)
        self._to_float = library.ggml.ggml_get_type_traits(kind).contents.to_float
        self._plain = kind == 0

    def rows(self, ids: Sequence[int]) -> Floats:
        """(T, E). Raises ValueError where the file has become shorter."""
        packed = b"".join(map(self._packed, ids))
        if self._plain:
            return np.frombuffer(packed, np.float32).reshape(len(ids), self._width)
        found = np.empty((len(ids), self._width), np.float32)
        self._to_float(packed, found.ctypes.data, found.size)
        return found

    def _packed(self, id: int) -> bytes:
        self._file.seek(self._offset + id * self._row_bytes)
        row = self._file.read(self._row_bytes)
        if row is None or len(row) < self._row_bytes:
            raise ValueError("the GGUF file became shorter while it was in use")
        return row


class LlamaSlice:
    """One GGUF slice, loaded: hidden states in, hidden states or logits out. Close it."""

    def __init__(
        self, library: LlamaLibrary, path: Path, size: ContextSize, tapped: int | None
    ) -> None:
        """`tapped` is the layer, counted in the slice, whose output is wanted; None on a last
        slice.
        """
        self._library, self._api = library, library.api
        self._tapped = None if tapped is None else f"l_out-{tapped}".encode()
        self._found: list[Floats] = []
        self.model = self._api.llama_model_load_from_file(
            str(path).encode(), self._api.llama_model_default_params()
        )
        if not self.model:
            raise UnsupportedModel("llama.cpp cannot load this slice", hint="is the file whole?")
        self.context = self._api.llama_init_from_model(self.model, self._parameters(size))
        self._free = finalize(self, _free, self._api, self.context, self.model)
        if not self.context:
            self.close()
            raise NoCapacity(
                f"llama.cpp has no memory for {size.tokens} tokens of KV cache",
                hint="ask for fewer with --kv-tokens, or allow less with --memory",
            )
        self._memory = self._api.llama_get_memory(self.context)

    def _parameters(self, size: ContextSize) -> Any:
        asked = self._api.llama_context_default_params()
        asked.n_ctx, asked.n_seq_max, asked.kv_unified = size.tokens, size.sessions, True
        asked.n_batch = asked.n_ubatch = size.batch_tokens
        asked.n_threads = asked.n_threads_batch = size.threads
        if self._tapped is not None:
            self._callback = type(asked.cb_eval)(self._evaluated)  # kept as long as it is called
            asked.cb_eval = self._callback
        return asked

    def _evaluated(self, tensor: int, asking: bool, _: object) -> bool:
        if asking:
            name: bytes = self._library.ggml.ggml_get_name(tensor)
            return name == self._tapped
        self._found.append(self._library.floats_of(tensor))
        return True

    def close(self) -> None:
        """Free its memory; garbage collection does it too."""
        self._free()

    # ---- computing

    def forget(self, sequence: int, start: int = 0) -> None:
        """Free the cache of a sequence from this position on."""
        self._api.llama_memory_seq_rm(self._memory, sequence, start, -1)

    def hidden(self, x_TE: Floats, positions: Sequence[int], sequences: Sequence[int]) -> Floats:
        """(T, E), what the tapped layer makes of all of it. Raises RuntimeError."""
        self._found = []
        self._decode(x_TE, positions, sequences, range(len(x_TE)))
        return np.concatenate(self._found).reshape(x_TE.shape)

    def logits(
        self, x_TE: Floats, positions: Sequence[int], sequences: Sequence[int], lines: Sequence[int]
    ) -> Floats:
        """(lines, V), what follows these tokens of the batch. Raises RuntimeError."""
        self._decode(x_TE, positions, sequences, lines)
        width = self._api.llama_vocab_n_tokens(self._api.llama_model_get_vocab(self.model))
        pointers = [self._api.llama_get_logits_ith(self.context, line) for line in lines]
        return np.stack([np.ctypeslib.as_array(p, (width,)) for p in pointers])

    def advance(self, x_TE: Floats, positions: Sequence[int], sequences: Sequence[int]) -> None:
        """Fill the cache; nothing is wanted of it yet. Raises RuntimeError."""
        self._decode(x_TE, positions, sequences, ())

    def _decode(
        self,
        x_TE: Floats,
        positions: Sequence[int],
        sequences: Sequence[int],
        lines: Sequence[int],
    ) -> None:
        """Every array here is named, and so lives until llama.cpp has read it."""
        count = len(x_TE)
        x_TE = np.ascontiguousarray(x_TE, np.float32)
        at, owner = np.asarray(positions, np.int32), np.asarray(sequences, np.int32)
        owners = np.ones(count, np.int32)  # sequences a token
        address = owner.ctypes.data + 4 * np.arange(count, dtype=np.uintp)
        wanted = np.zeros(count, np.int8)
        wanted[list(lines)] = 1
        batch = self._api.llama_batch(
            count,
            None,
            _as(ctypes.c_float, x_TE),
            _as(ctypes.c_int32, at),
            _as(ctypes.c_int32, owners),
            ctypes.cast(address.ctypes.data, ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
            _as(ctypes.c_int8, wanted),
        )
        status = self._api.llama_decode(self.context, batch)
        if status:
            raise RuntimeError(f"llama.cpp could not compute a batch of {count} tokens ({status})")


def _free(api: Any, context: Any, model: Any) -> None:
    if context:
        api.llama_free(context)
    api.llama_model_free(model)


def _as(kind: Any, array: npt.NDArray[Any]) -> Any:
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))
