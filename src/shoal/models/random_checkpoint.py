"""Writes a checkpoint with random weights: for proofs, tests and benchmarks that need a shape and
no knowledge.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .skeleton import causal_class, quiet, read_config


def write_random_checkpoint(
    config: dict[str, Any],
    folder: Path,
    *,
    seed: int = 0,
    dtype: str = "float32",
    shard: str = "60KB",
) -> Any:
    """Write it in shards of at most `shard`; returns transformers' own model of it, on the CPU, in
    eval mode.
    """
    parsed = read_config(config)
    generator = torch.Generator().manual_seed(seed)
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = causal_class(parsed)._from_config(
            parsed, dtype=getattr(torch, dtype), attn_implementation="eager"
        )
        _randomise(model, generator)
        model.save_pretrained(folder, max_shard_size=shard)
    return model.eval()


@torch.no_grad()
def _randomise(model: Any, generator: torch.Generator) -> None:
    """Persistent buffers too: a router's correction bias is one."""
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        if tensor.dim() < 2:
            tensor.add_(0.1 * noise)
        else:
            tensor.copy_(noise * (0.3 if "embed" in name else tensor.shape[-1] ** -0.5))
