"""Which node serves which layers, and which nodes a session runs through.

Pure functions of what a node knows about the mesh: no clock, no chance, no socket. Every node runs
the same functions on its own view and carries out only its own part; there is no scheduler.

Knows: layers and their bytes, what fits where, who holds what, how long a token takes on a route.
Does not know: announcements, checkpoints, links, torch. `node/` translates those into `model.py`.
Start reading at `decide.py` (joining) and `routes.py` (serving).
"""

from .capacity import Capacities, capacities, capacity
from .choose import choose_slice
from .coverage import coverable, coverage, covered, missing, weakest
from .decide import decide
from .expect import Network, Work
from .model import Decision, Held, Member, ModelShape, Pool, Wanted
from .plan import plan
from .routes import Route, Trip, cheapest_route, route_seconds
from .split import split

__all__ = [
    "Capacities",
    "Decision",
    "Held",
    "Member",
    "ModelShape",
    "Network",
    "Pool",
    "Route",
    "Trip",
    "Wanted",
    "Work",
    "capacities",
    "capacity",
    "cheapest_route",
    "choose_slice",
    "coverable",
    "coverage",
    "covered",
    "decide",
    "missing",
    "plan",
    "route_seconds",
    "split",
    "weakest",
]
