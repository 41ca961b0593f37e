"""Low-bit checkpoints as others publish them, one format a file.

Knows: which stored tensors make up one weight of the architecture, their layout bit by bit, and
what the numbers mean.
Does not know: models, layers, slices, how shoal itself computes with few bits (`exact/`).
Everything but the arithmetic works without torch: sizes are told by the files' headers alone.
Start reading at `layout.py`; `methods.py` chooses by `config.json`, `view.py` reads.
"""

from .layout import Layout, Plain, plain_tensors
from .methods import architecture, described, layouts_of

__all__ = ["Layout", "Plain", "architecture", "described", "layouts_of", "plain_tensors"]
