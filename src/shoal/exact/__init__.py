"""Arithmetic whose results do not depend on who computes it, with what else, or in which order.

Knows: how numbers are rounded to integers of a common scale, so that every long sum is exact; the
plain-torch form of each operation (`numbers.py`, `attention.py`), which is its definition; and a
compiled library (`csrc/`, optional) that gives the same bits faster.
Does not know: models, layers, checkpoints, sessions. Start reading at `numbers.py`.
"""

__all__: list[str] = []
