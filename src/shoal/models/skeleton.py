"""A transformers model without its weights, cut down to a slice: foreign layers only pass through.

The layer list keeps its length, so layer indices, `config.layer_types` and every pattern over
layers stay global.
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import UnsupportedModel
from ..units import Slice
from . import attention

STATE_LAYERS = {"linear_attention", "conv", "hybrid"}  # they keep a running state
SUPPORTED_LAYERS = {"full_attention", "sliding_attention", "attention", *STATE_LAYERS}
LAST_NORMS = ("norm", "final_layernorm", "embedding_norm")
SAME_AS = {"kimi_k2": "deepseek_v3"}  # the same architecture under a name of its own
# what library code raises when it is asked for something that it cannot do
LIBRARY_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


class PassThrough(nn.Module):
    """Stands for a layer of another stage; keeps the plain attributes that a model's loop may ask
    its layers for. Where such a layer answers with a tuple, so does this.
    """

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        self.answers = _answers(type(like).forward)
        for name, value in vars(like).items():
            if isinstance(value, str | int | float) and name not in self.__dict__:
                setattr(self, name, value)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.answers:
            return hidden_states
        return hidden_states, *[None] * (self.answers - 1)


@cache
def _answers(forward: Callable[..., Any]) -> int:
    """How long the tuple is that it returns, 0 for none: by its code, since annotations err."""
    try:
        source = inspect.getsource(inspect.unwrap(forward))
    except OSError:  # the proof will tell
        return 0
    nodes = ast.walk(ast.parse(textwrap.dedent(source)))
    returned = [node.value for node in nodes if isinstance(node, ast.Return)]
    last = returned[-1] if returned else None
    return len(last.elts) if isinstance(last, ast.Tuple) else 0


class _EmptyOnMeta(TorchFunctionMode):
    """`torch.empty` has no content, so nothing is lost on `meta`: weights take no memory, computed
    buffers are real.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.empty:
            kwargs = {**(kwargs or {}), "device": "meta"}
        return func(*args, **(kwargs or {}))


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no advice from transformers while we use it."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def read_config(raw: dict[str, Any]) -> Any:
    """transformers' own configuration object. Raises UnsupportedModel for what is unknown or no
    plain decoder.
    """
    from transformers import __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = SAME_AS.get(raw["model_type"], raw["model_type"])
    if model_type not in CONFIG_MAPPING:
        raise UnsupportedModel(
            f"transformers {__version__} does not know models of type {model_type!r}",
            hint="code that comes with a checkpoint is never run; a newer shoal may know it",
        )
    try:
        config = CONFIG_MAPPING[model_type].from_dict(
            _with_floats({**raw, "model_type": model_type})
        )
    except LIBRARY_ERRORS as error:
        raise UnsupportedModel(f"this {model_type} configuration is wrong: {error}") from error
    _check_config(config)
    return config


def _with_floats(value: Any) -> Any:
    """A copy in which infinities are numbers: JSON has none, so transformers writes objects."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _with_floats(each) for key, each in value.items()}
    return [_with_floats(each) for each in value] if isinstance(value, list) else value


def _check_config(config: Any) -> None:
    if getattr(config, "is_encoder_decoder", False) or config.get_text_config() is not config:
        raise _unsupported(config, "it is not a plain text decoder")
    kinds = set(getattr(config, "layer_types", None) or ()) - SUPPORTED_LAYERS
    if kinds:
        raise _unsupported(config, f"its layers need {', '.join(sorted(kinds))}")
    if getattr(config, "attention_chunk_size", None):
        raise _unsupported(config, "its layers need chunked_attention")


def keeps_states(config: Any) -> bool:
    """Whether some of its layers keep a running state instead of keys and values."""
    return not STATE_LAYERS.isdisjoint(getattr(config, "layer_types", None) or ())


def _unsupported(config: Any, why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"models of type {config.model_type} cannot be served yet: {why}",
        hint="decoders that keep only keys and values are served: llama, qwen3, mixtral, ...",
    )


def causal_class(config: Any) -> Any:
    """The ...ForCausalLM class of this configuration; imports only its own modelling file."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _unsupported(config, "it has no text generation head")
    found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    # those with running states do not say so, though it can be: the proof tells
    promises = ("_supports_attention_backend", "_is_stateful")
    if not any(getattr(found, promise, False) for promise in promises):
        raise _unsupported(config, "its attention cannot be replaced")
    return found


def build(raw_config: dict[str, Any], layers: Slice, dtype: torch.dtype) -> Any:
    """The model with own layers on `meta`, foreign ones passing through, and the ends that are not
    ours left out.
    """
    config = read_config(raw_config)
    model_class = causal_class(config)
    with _EmptyOnMeta():
        model = model_class._from_config(config, dtype=dtype, attn_implementation="eager")
    attention.register()
    model.config._attn_implementation = attention.NAME
    _cut(model, layers)
    return model.eval()


def part_of(model: Any, layers: Slice) -> Any:
    """A model of the same modules that runs only these of its layers; `model` stays as it is."""
    part, base = _twin(model), _twin(model.base_model)
    setattr(part, model.base_model_prefix, base)
    base.layers = nn.ModuleList(base.layers)
    _cut(part, layers)
    return part


def _twin(module: Any) -> Any:
    """Another module with the same children, parameters and settings."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)  # copies share this one otherwise
    return twin


def _cut(model: Any, layers: Slice) -> None:
    base = model.base_model
    norm = next((name for name in LAST_NORMS if hasattr(base, name)), None)
    named = all(hasattr(base, name) for name in ("layers", "embed_tokens"))
    if norm is None or not named or not hasattr(model, "lm_head"):
        raise _unsupported(
            model.config, "its parts are not named embed_tokens, layers, norm and lm_head"
        )
    count = len(base.layers)
    for index in range(count):
        if layers.start <= index < layers.stop or isinstance(base.layers[index], PassThrough):
            continue
        base.layers[index] = PassThrough(base.layers[index])
    if layers.stop < count:
        setattr(base, norm, nn.Identity())
        model.lm_head = nn.Identity()
    tied = layers.stop == count and bool(getattr(model.config, "tie_word_embeddings", False))
    if layers.start > 0 and not tied:
        base.embed_tokens = nn.Identity()
