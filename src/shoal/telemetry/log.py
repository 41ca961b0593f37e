"""One line for people about each event worth a line, through the stdlib logger `shoal`."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

from ..events import (
    BackendChanged,
    ClockSkewed,
    Event,
    LinkLost,
    LinkUp,
    NodeGone,
    NodeSeen,
    PeerFault,
    Recovered,
    RelayChanged,
    RequestDone,
    RequestStarted,
    RouteTaken,
    StageChanged,
)
from ..units import NodeId

logger = logging.getLogger("shoal")
Line = tuple[int, str]  # level, text


def configure_logging(level: int = logging.INFO, stream: TextIO | None = None) -> None:
    """Send our lines to `stream` (stderr by default); a second call replaces the first.

    For programs only: a library leaves logging alone.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S"))
    logger.handlers = [handler]
    logger.setLevel(level)
    logger.propagate = False


def log_event(event: Event) -> None:
    """A listener for `EventHub`."""
    line = line_of(event)
    if line is not None:
        logger.log(*line)


def line_of(event: Event) -> Line | None:
    """Level and text; None for what happens too often to read."""
    match event:
        case NodeSeen() | NodeGone() | LinkUp() | LinkLost() | PeerFault() | RelayChanged():
            return _mesh_line(event)
        case ClockSkewed(offset_s):
            level = logging.WARNING if offset_s else logging.INFO
            way = f"is {abs(offset_s):.0f} s {'behind' if offset_s > 0 else 'ahead of'} the others'"
            return level, f"clock    this machine's {way if offset_s else 'is right again'}"
        case StageChanged(model, layers, state):
            level = logging.ERROR if state == "failed" else logging.INFO
            return level, f"stage    {model} layers {layers}: {state}"
        case BackendChanged(_, name, answers):
            level = logging.INFO if answers else logging.WARNING
            return level, f"backend  {name}: {'answers' if answers else 'does not answer'}"
        case RequestStarted() | RouteTaken() | Recovered() | RequestDone():
            return _request_line(event)
        case _:
            return None


def _mesh_line(event: NodeSeen | NodeGone | LinkUp | LinkLost | PeerFault | RelayChanged) -> Line:
    match event:
        case NodeSeen(node, name):
            return logging.INFO, f"node     {name} ({short(node)}) is here"
        case NodeGone(node, reason):
            return logging.INFO, f"node     {short(node)} is gone: {reason}"
        case LinkUp(node):
            return logging.DEBUG, f"link     to {short(node)}"
        case LinkLost(node, reason):
            return logging.INFO, f"link     to {short(node)} lost: {reason}"
        case PeerFault(node, code):
            who = short(node) if node else "an unknown peer"
            return logging.WARNING, f"fault    of {who}: {code}"
        case RelayChanged(url, connected):
            level = logging.INFO if connected else logging.WARNING
            return level, f"relay    {url} {'connected' if connected else 'lost'}"


def _request_line(event: RequestStarted | RouteTaken | Recovered | RequestDone) -> Line:
    match event:
        case RequestStarted(session, model_name, prompt_tokens):
            return logging.DEBUG, f"request  {session} {model_name}: {prompt_tokens} prompt tokens"
        case Recovered(session, kind, seconds, tokens):
            again = f", {tokens} tokens sent again" if tokens else ""
            return logging.INFO, f"route    {session}: {kind} in {seconds:.2f} s{again}"
        case RouteTaken(session, route, attempt, kind):
            hops = " > ".join(f"{short(node)} {layers}" for node, layers in route)
            level = logging.WARNING if attempt > 1 else logging.DEBUG
            again = f", attempt {attempt}: {kind}" if attempt > 1 else ""
            return level, f"route    {session}: {hops}{again}"
        case RequestDone(session, model_name, reason, tokens, seconds):
            level = logging.INFO if reason in ("stop", "length") else logging.WARNING
            rate = f", {tokens / seconds:.1f} a second" if seconds > 0 else ""
            return level, f"request  {session} {model_name}: {reason} after {tokens} tokens{rate}"


def short(node: NodeId) -> str:
    """`npub1q8s...x7f` as people compare it."""
    return node if len(node) <= 14 else f"{node[:9]}…{node[-4:]}"
