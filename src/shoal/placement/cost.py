"""What a slice will cost on a node that does not hold it yet: the expected half of the cost model.

Decoding reads every weight once a step and every kept key and value once a token; prompts multiply.
What the node measured of itself (`Capability`) says how fast it does either; the shares below say
how much of that our engine gets out of it (`bench/cost.py` measures both). As soon as a stage
runs, `engine/pace.py` corrects all of it by what its steps take.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..hardware import Capability, Speed
from ..units import Slice
from .model import ModelShape

GUESSED_BYTES_PER_S = 1e10  # memory of a node that has not measured it
GUESSED_OPS_PER_S = 1e11
RATES = (1e3, 1e18)  # of bytes and operations a second: beyond them nobody is believed
STEP_S = 0.5e-3  # building a batch, and what the pipeline does about it
ATTENDS = 0.25  # of what memory gives: keys and values are scattered in pages, and computed with


@dataclass(frozen=True, slots=True)
class _Class:
    """How weights are kept, and the shares of the measured rates that the engine reaches."""

    rate: str  # of Capability
    bytes_per_weight: float
    reads: float
    multiplies: float


_INT8 = _Class("int8_ops", 1.0, 0.8, 0.8)
_CLASSES = {
    "int8": _INT8,
    "int4": _Class("int8_ops", 17 / 32, 0.6, 0.8),
    "w8": _Class("bf16_flops", 1.0, 0.6, 0.5),
    "w4": _Class("bf16_flops", 20 / 32, 0.5, 0.5),
    "bf16": _Class("bf16_flops", 2.0, 0.7, 0.8),
    "f16": _Class("f32_flops", 2.0, 0.5, 0.3),
    "f32": _Class("f32_flops", 4.0, 0.8, 0.6),
    "gguf": _Class("int8_ops", 0.6, 0.6, 0.1),
}


def predict(
    capability: Capability, shape: ModelShape, compute: str, part: Slice | None = None
) -> Speed:
    """What these layers, or any one, will take on such a node, in this compute class."""
    how = _CLASSES.get(compute, _INT8)
    memory = _believed(capability.memory_bytes_per_s or GUESSED_BYTES_PER_S)
    reads = how.reads * memory
    ops = how.multiplies * _believed(getattr(capability, how.rate) or GUESSED_OPS_PER_S)
    layers = range(shape.layers) if part is None else part
    layer_bytes = sum(shape.layer_bytes[layer] for layer in layers) / len(layers)
    experts, routed = min(shape.experts_bytes, layer_bytes), shape.routed
    active = layer_bytes - experts * (1 - routed)
    ends = part is not None and part.stop == shape.layers
    return Speed(
        step_s=STEP_S + ends * shape.head_bytes / reads,
        layer_s=(layer_bytes - experts) / reads,
        token_s=2 * active / how.bytes_per_weight / ops,
        context_s=shape.kv_bytes_per_token_per_layer / (ATTENDS * memory),
        sample_s=ends * 2 * shape.head_bytes / _CLASSES["int8"].bytes_per_weight / ops,
        experts_s=experts / reads,
        routed=routed if experts else 0.0,
    )


def _believed(rate: float) -> float:
    return min(max(rate, RATES[0]), RATES[1])


def request_seconds(
    speed: Speed, layers: int, prompt_tokens: int, output_tokens: int, beside: int = 1
) -> float:
    """Seconds of a stage's time that one request takes, if `beside` sessions share its steps: what
    routing compares, what the mesh can serve in all, and what a price is made of.
    """
    prompt_pairs = prompt_tokens * (prompt_tokens + 1) // 2
    prompt_s = layers * (prompt_tokens * speed.token_s + prompt_pairs * speed.context_s)
    context = prompt_tokens + output_tokens // 2
    step_s = speed.seconds(layers, beside, beside * context, beside)
    return prompt_s + output_tokens * step_s / beside
