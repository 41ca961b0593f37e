"""Turns a Hugging Face checkpoint into an `nn.Module` that computes a slice of its layers.

Knows: files of a checkpoint, tensor names, transformers' own modules, tokenizers.
Does not know: sessions, pages, batches, nodes. How attention reads a cache is handed in by
argument (`attention.py`).
`checkpoint.py` and `text.py` work without torch; start reading at `checkpoint.py`, then `slice.py`.
"""

__all__: list[str] = []
