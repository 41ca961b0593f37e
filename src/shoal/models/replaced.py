"""What all modules have in common that stand in the place of an `nn.Linear`."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ReplacedLinear(nn.Module):
    """Computes one linear layer for inference, with weights of its own making. Built on the device
    of `linear`, it stays there and is neither saved nor copied.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._stand_in = torch.full_like(linear.weight.detach()[:1, :1], torch.nan)

    @property
    def weight(self) -> Tensor:
        """Tells models that ask which shape, dtype and device the float weight had; all NaN."""
        return self._stand_in.expand(self.out_features, self.in_features)
