"""What a node would give: tokens per second, for every number of layers that it may hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import msgspec

from ..hardware import Speed
from .expect import LONGEST_S
from .model import Member, ModelShape

BATCH = 32  # sessions that share a step where there is room for their caches
CONTEXT = 1024  # tokens of a typical session, half of which are there on average
PROMPT_SHARE = 3  # tokens of prompts that are read for each one that is written
FASTEST = 64  # times the middle of all: who says it is quicker still is taken for that
QUICKEST_S = 1e-9  # a step: who says less, or more than LONGEST_S, says nothing
STEPS_PER_DOUBLING = 8  # speeds are told apart by about a tenth: they are measured, and vary


def tokens_per_s(shape: ModelShape, member: Member, layers: int) -> float:
    """With so many layers of the model, at a typical load.

    Fewer layers take less time and leave more memory for sessions, which then share steps.
    """
    return _tokens_per_s(shape, member.speed, member.memory_bytes, layers)


def believed(members: Sequence[Member]) -> list[Member]:
    """The members, none of them much faster than the rest: beside one that says it does all the
    work in no time nobody else would count, wherever it is.
    """
    if not members:
        return []
    speeds = [_typical(one.speed, 1, BATCH) for one in members]
    order = sorted(range(len(members)), key=speeds.__getitem__)
    middle = order[(len(order) - 1) // 2]
    most = members[middle].speed
    least_s = {name: value / FASTEST for name, value in msgspec.structs.asdict(most).items()} | {
        "routed": most.routed
    }
    fastest = Speed(**least_s)
    return [
        replace(one, speed=fastest) if speed > FASTEST * speeds[middle] else one
        for one, speed in zip(members, speeds, strict=True)
    ]


def rates(shape: ModelShape, member: Member, most: int) -> tuple[float, ...]:
    """`tokens_per_s` with 1 to `most` layers."""
    return _rates(shape, member.speed, member.memory_bytes, most)


@lru_cache(maxsize=1 << 12)  # asked anew at each decision, of nodes that seldom change
def _rates(shape: ModelShape, speed: Speed, memory_bytes: int, most: int) -> tuple[float, ...]:
    return tuple(_tokens_per_s(shape, speed, memory_bytes, n) for n in range(1, most + 1))


def _tokens_per_s(shape: ModelShape, speed: Speed, memory_bytes: int, layers: int) -> float:
    room = BATCH
    kv_bytes = shape.kv_bytes_per_token_per_layer * layers
    if memory_bytes and kv_bytes:
        weights = layers * shape.sums[-1] // shape.layers
        tokens = (memory_bytes - weights) // kv_bytes
        room = max(1, min(BATCH, tokens // CONTEXT))
    return _typical(speed, layers, room)


@lru_cache(maxsize=1 << 16)
def _typical(speed: Speed, layers: int, sessions: int) -> float:
    work = sessions * (1 + PROMPT_SHARE)
    seconds = speed.seconds(layers, work, sessions * CONTEXT // 2, sessions)
    doublings = math.log2(sessions / min(max(seconds, QUICKEST_S), LONGEST_S))
    return float(2 ** (round(doublings * STEPS_PER_DOUBLING) / STEPS_PER_DOUBLING))
