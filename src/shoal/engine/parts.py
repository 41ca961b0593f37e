"""The rows of one step by the layers that they run: a session may use but a part of a stage's.

T tokens of some rows · E hidden width
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

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

    @property
    def lines(self) -> list[int]:
        """The tokens of its rows after which logits are wanted."""
        ends = list(accumulate(row.count for row in self.rows)) if self.asked else []
        return [
            line
            for index in self.asked
            for line in range(ends[index] - 1 - len(self.rows[index].draft), ends[index])
        ]

    @property
    def hidden(self) -> Tensor:
        """(T, E): what its rows have brought. Raises ValueError when they brought nothing."""
        parts = [row.hidden for row in self.rows if row.hidden is not None]
        if not parts:
            raise ValueError("rows that begin behind the first layer bring hidden states")
        return parts[0] if len(parts) == 1 else torch.cat(parts)


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
