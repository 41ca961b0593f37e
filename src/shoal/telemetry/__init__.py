"""Makes readable what happens in a node: metrics for Prometheus, lines for people.

Knows: the events. Does not know: who emits them, or the parts behind them; nobody imports telemetry
but the composition root. No prompt text passes through here, since events carry none.
"""

from .log import configure_logging, log_event
from .metrics import Metrics

__all__ = ["Metrics", "configure_logging", "log_event"]
