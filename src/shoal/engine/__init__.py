"""Computes one slice of one model on this machine.

Knows: token ids, hidden states, the KV cache, batches, sampling, the device.
Does not know: nodes, routes, sessions' lives, text, prices. `request.py`, `rows.py`, `pages.py`
and `batcher.py` work
without torch. Start reading at `stage.py`.
"""

__all__: list[str] = []
