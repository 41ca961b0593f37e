"""An engine of another make, behind an HTTP server, as a source of tokens.

Knows: the dialects of llama.cpp's server, vLLM and whatever speaks OpenAI's completions; how to
find out which is there; ids and text. Does not know: sessions, nodes, the mesh. The dialects are
pure; `client.py` alone has a socket. Start reading at `dialect.py`.
"""

from .client import BackendAddress, EngineClient
from .dialect import Dialect, Job
from .engine import Engine
from .probe import Probed, probe

__all__ = ["BackendAddress", "Dialect", "Engine", "EngineClient", "Job", "Probed", "probe"]
