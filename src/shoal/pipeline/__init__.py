"""One request over many nodes: sessions on a ring of stages, and what happens when one of them
dies.

Knows: routes, sessions, stages, token ids, who sends what to whom. Does not know: text, prices, how
a route is chosen, how a layer is computed, what a connection is. The protocol is pure: `table.py`
and `stage.py` are the stage's side of a session, `admission.py` says who gets pages,
`generation.py` is the gateway's side; `resuming.py`, `mending.py`, `recovery.py` and `reunion.py`
are what they do when a route breaks; `worker.py` and `gateway.py` merely carry. Start reading at
`messages.py`.
"""

from .fronted import FrontedWorker, next_wait
from .gateway import Gateway, Stream
from .loading import ServingConfig, import_engine
from .messages import Load
from .plans import ANY_TOKEN, GenerationConfig, Plan, Planner, Request, Stop, Wish
from .service import Pipeline
from .serving import Served, Serving
from .stage_key import StageKey
from .worker import StageWorker

__all__ = [
    "ANY_TOKEN",
    "FrontedWorker",
    "Gateway",
    "GenerationConfig",
    "Load",
    "Pipeline",
    "Plan",
    "Planner",
    "Request",
    "Served",
    "Serving",
    "ServingConfig",
    "StageKey",
    "StageWorker",
    "Stop",
    "Stream",
    "Wish",
    "import_engine",
    "next_wait",
]
