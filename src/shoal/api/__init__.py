"""The front door: OpenAI's HTTP interface over whatever answers behind it.

Knows: HTTP, JSON, server-sent events, text and its tokens, API keys.
Does not know: nodes, routes, layers, devices. All of that is behind `Backend`.
Start reading at `app.py`, then `openai.py` and `answer.py`.
"""

from .app import create_app
from .backend import Backend, Generation, GenerationRequest, ServedModel
from .config import ApiConfig, config_for_bind
from .server import ApiServer

__all__ = [
    "ApiConfig",
    "ApiServer",
    "Backend",
    "Generation",
    "GenerationRequest",
    "ServedModel",
    "config_for_bind",
    "create_app",
]
