"""Memory that is set aside once and for all."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import NoCapacity


def allocate(slots: int, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A pool of (slots, *shape), all zero. Raises NoCapacity."""
    try:
        return torch.zeros(slots, *shape, dtype=dtype, device=device)
    except RuntimeError as error:
        raise NoCapacity(
            f"no memory for a cache of {slots} x {list(shape)}: {error}",
            hint="ask for fewer with --kv-tokens, or allow less with --memory",
        ) from None
