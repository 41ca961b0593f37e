"""The rows of one step by the layers that they run: a session may use but a part of a stage's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..units import Slice
from .rows import Row


@dataclass(frozen=True, slots=True)
class Portion:
    """Those rows of a step that run the same layers.

    `at` are their places among all rows of the step; `asked` says whose logits are wanted, counted
    among `rows`.
    """

    layers: Slice
    at: Sequence[int]
    rows: Sequence[Row]
    asked: Sequence[int]


def by_part(rows: Sequence[Row], asked: Sequence[int], whole: Slice) -> list[Portion]:
    """All rows, in one portion for each part; `whole` are the layers of the stage."""
    if all(row.layers is None for row in rows):  # the usual case
        return [Portion(whole, range(len(rows)), rows, asked)]
    found: dict[Slice, list[int]] = {}
    for index, row in enumerate(rows):
        found.setdefault(row.layers or whole, []).append(index)
    wanted = set(asked)
    return [
        Portion(
            part,
            at,
            [rows[index] for index in at],
            [place for place, index in enumerate(at) if index in wanted],
        )
        for part, at in found.items()
    ]


def in_order(found: Sequence[tuple[Sequence[int], Tensor]], counts: Sequence[int]) -> Tensor:
    """The lines of some rows, put in the order of the rows: with each tensor comes which rows it is
    of, and counts[i] is how many lines row i has.
    """
    if len(found) == 1:
        return found[0][1]
    lines: dict[int, Tensor] = {}
    for rows, joined in found:
        lines.update(zip(rows, torch.split(joined, [counts[row] for row in rows]), strict=True))
    return torch.cat([lines[row] for row in sorted(lines)])
