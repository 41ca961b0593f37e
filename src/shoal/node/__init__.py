"""The composition root: builds the parts of a node, hands each what it needs, and runs them in one
task group.

Knows: every folder below `cli`. Does not know: terminals. Start reading at `node.py`; `config.py`
turns settings into what the parts take, `router.py` joins the mesh view with placement,
`backend.py` is what the API sees, `report.py` what people see.
"""

from .config import NodeConfig, node_config
from .node import Node

__all__ = ["Node", "NodeConfig", "node_config"]
