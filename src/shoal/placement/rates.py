"""What a node would give: tokens per second, for every number of layers that it may hold."""

from __future__ import annotations

import math
from functools import lru_cache

from ..hardware import Speed
from .model import Member, ModelShape

BATCH = 32  # sessions that share a step where there is room for their caches
CONTEXT = 1024  # tokens of a typical session, half of which are there on average
PROMPT_SHARE = 3  # tokens of prompts that are read for each one that is written
STEPS_PER_DOUBLING = 8  # speeds are told apart by about a tenth: they are measured, and vary


def tokens_per_s(shape: ModelShape, member: Member, layers: int) -> float:
    """With so many layers of the model, at a typical load.

    Fewer layers take less time and leave more memory for sessions, which then share steps.
    """
    room = BATCH
    kv_bytes = shape.kv_bytes_per_token_per_layer * layers
    if member.memory_bytes and kv_bytes:
        weights = layers * shape.sums[-1] // shape.layers
        tokens = (member.memory_bytes - weights) // kv_bytes
        room = max(1, min(BATCH, tokens // CONTEXT))
    return _typical(member.speed, layers, room)


@lru_cache(maxsize=1 << 16)
def _typical(speed: Speed, layers: int, sessions: int) -> float:
    work = sessions * (1 + PROMPT_SHARE)
    seconds = speed.seconds(layers, work, sessions * CONTEXT // 2, sessions)
    doublings = math.log2(sessions / max(seconds, 1e-9))
    return float(2 ** (round(doublings * STEPS_PER_DOUBLING) / STEPS_PER_DOUBLING))
