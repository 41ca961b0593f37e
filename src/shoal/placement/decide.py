"""A node's own decision: what it should hold, by its own view of everybody."""

from __future__ import annotations

from collections.abc import Sequence

from ..units import NodeId, Slice
from .choose import choose_slice
from .coverage import covered
from .model import Decision, Member, ModelShape, Pool
from .plan import plan


def decide(me: NodeId, pool: Pool) -> Decision:
    """What `me` should hold now. Pure: nodes with the same view decide as one."""
    for wanted in pool.wanted:
        members = pool.members[wanted.model]
        if any(member.node == me for member in members):
            layers = choose_layers(wanted.shape, me, members)
            return Decision(wanted.model, layers)
    return Decision(None, None, reason="there is no model that fits here")


def choose_layers(shape: ModelShape, me: NodeId, members: Sequence[Member]) -> Slice | None:
    """What `me`, one of `members`, should hold now; None when nothing fits.

    Evaluate it again whenever the view changes and load what comes out. Nodes with the same view
    make one plan together; nobody who serves moves while a route exists, nor for a plan that would
    not cover the model.
    """
    held = {member.node: member.layers for member in members if member.layers}
    if not covered(shape.layers, held.values()):
        held = plan(shape, members) or held
    free = sorted((m for m in members if m.node not in held), key=lambda m: m.node)
    for member in free:
        if me in held:
            break
        chosen = choose_slice(shape.layers, member.capacities, list(held.values()))
        if member.node == me:
            return chosen
        if chosen:
            held[member.node] = chosen
    return held.get(me)
