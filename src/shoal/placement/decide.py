"""A node's own decision: what it should hold, by its own view of everybody.

All nodes run this on the same announcements and each carries out its own part. In this order:
a hole is filled by those who are free; where they cannot, by moving as few bytes as possible; a
region that has room for the whole model is made to hold all of it; and when the layout as a whole
carries much less than the best one known, its nodes step over to that, one at a time, and nobody
leaves a layer before somebody else serves it. Each of these ends: holes only become fewer, and a
step is always one to a place where the node then stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

from ..units import NodeId, Slice
from .arrange import FEW, Field, arrange
from .balance import item_of, laid_of, much_better, next_step
from .choose import choose_slice
from .coverage import covered
from .demand import chosen_model
from .model import Decision, Member, Pool, Wanted
from .plan import plan
from .regions import regions, territories

STAGGER_S = 0.3  # between those who want the same
MAX_TURNS = 10
CALM_S = 3.0  # a layout that only could be better has time
BUCKET = 200  # free nodes that think of each other; of more, each bucket spreads by itself


def decide(me: NodeId, pool: Pool) -> Decision:
    """What `me` should hold now. Pure: nodes with the same view decide as one."""
    wanted, reason = chosen_model(me, pool)
    if wanted is None:
        return Decision(None, None, reason="no model that we have fits here")
    members = sorted(pool.members[wanted.model], key=lambda member: member.node)
    mine = next(member for member in members if member.node == me)
    here = [one for one in members if one.elsewhere is None or one.node == me]
    if mine.pinned:
        return Decision(wanted.model, mine.layers, reason="pinned")
    if wanted.whole:
        layers, why, turns = _whole(wanted, me, here)
    else:
        layers, why, turns = _View(wanted, me, here).mine()
    wait_s = 0.0 if layers in (None, mine.layers) else turns * STAGGER_S
    return Decision(wanted.model, layers, wait_s, why or reason)


def turn(me: NodeId, others: Sequence[NodeId], about: object) -> int:
    """Our place among those who want the same: another one for each occasion, the same to all."""

    def rank(node: NodeId) -> bytes:
        return blake2b(f"{node} {about}".encode(), digest_size=8).digest()

    mine = rank(me)
    return min(MAX_TURNS, sum(rank(node) < mine for node in others))


Choice = tuple[Slice | None, str, float]  # what, why, how many turns to wait


class _View:
    """One model in one compute class, as `me` sees it."""

    def __init__(self, wanted: Wanted, me: NodeId, members: Sequence[Member]) -> None:
        self.shape, self.me, self.members = wanted.shape, me, members
        self.today = {one.node: one.layers for one in members if one.layers}
        self.regions = regions(members)
        self.grounds = territories(self.shape, self.regions)

    def mine(self) -> Choice:
        held = self.today | self._free()
        why = "the weakest layers"
        if not covered(self.shape.layers, held.values()):
            held = self._planned(self.members, held)
            why = "a hole" if covered(self.shape.layers, held.values()) else "what there is"
        if not covered(self.shape.layers, self.today.values()):
            held = self._anew(held)
        else:
            held = self._made_whole(held)
        before, after = self.today.get(self.me), held.get(self.me)
        if before is None:
            free = [one.node for one in self.members if one.layers is None]
            return after, why, turn(self.me, free, len(self.today)) if self.today else 0
        if before != after:
            moving = [node for node, part in held.items() if self.today.get(node, part) != part]
            return after, why, 1 + turn(self.me, moving, len(self.today))
        return self._balanced()

    def _free(self) -> dict[NodeId, Slice]:
        """Where the free nodes stand, each in its own region."""
        found: dict[NodeId, Slice] = {}
        quick = sum(one.layers is None for one in self.members) > FEW
        for region, ground in zip(self.regions, self.grounds, strict=True):
            free = self._bucket([one for one in region if one.layers is None])
            if free:
                items = [item_of(self.shape, one) for one in free]
                fixed = laid_of(self.shape, region)
                laid = arrange(self.shape.layers, items, fixed, ground, quick=quick)
                found |= {node: one.layers for node, one in laid.items()}
        return found

    def _bucket(self, free: list[Member]) -> list[Member]:
        """Of very many free nodes those who think of each other."""
        if len(free) <= BUCKET:
            return free
        buckets = -(-len(free) // BUCKET)
        kept: dict[int, list[Member]] = {}
        for one in free:
            kept.setdefault(turn_of(one.node, buckets), []).append(one)
        mine = turn_of(self.me, buckets)
        return kept.get(mine) or next(iter(kept.values()))

    def _planned(self, members: Sequence[Member], held: dict[NodeId, Slice]) -> dict[NodeId, Slice]:
        """With the fewest bytes moved; who is free takes as much around its part as is good."""
        found = plan(self.shape, members, hints=held)
        if found is None:
            return held
        free = {one.node: one for one in members if one.layers is None}
        field = Field(
            self.shape.layers, laid_of(self.shape, members), Slice(0, self.shape.layers), 1.0
        )
        for node in sorted(found):
            if node in free:
                laid = field.best(item_of(self.shape, free[node]), must=found[node])
                found[node] = laid.layers if laid else found[node]
        return held | found

    def _anew(self, held: dict[NodeId, Slice]) -> dict[NodeId, Slice]:
        """While nothing can be served a better layout costs no service: all step over to it."""
        pairs = list(zip(self.regions, self.grounds, strict=True))
        fresh = much_better(self.shape, self.members, pairs, held)
        return held if fresh is None else held | fresh

    def _made_whole(self, held: dict[NodeId, Slice]) -> dict[NodeId, Slice]:
        """A region that has room for all layers holds all of them."""
        for region, ground in zip(self.regions, self.grounds, strict=True):
            if len(self.regions) == 1 or len(ground) < self.shape.layers:
                continue
            parts = [held[one.node] for one in region if one.node in held]
            if covered(self.shape.layers, parts):
                continue
            found = self._planned(region, held)
            if covered(self.shape.layers, found.values()):
                held = self._without_gaps(found, held)
        return held

    def _without_gaps(
        self, found: dict[NodeId, Slice], held: dict[NodeId, Slice]
    ) -> dict[NodeId, Slice]:
        """Movers who would leave a layer that nobody else serves now stay for the time being."""
        serving = {
            one.node: one.layers for one in self.members if one.layers and one.state == "serving"
        }
        kept = dict(found)
        for node in sorted(found):
            if node in serving and found[node] != serving[node]:
                rest = {other: part for other, part in serving.items() if other != node}
                if covered(self.shape.layers, serving.values()) and not covered(
                    self.shape.layers, rest.values()
                ):
                    kept[node] = held[node]
                else:
                    serving = rest
        return kept

    def _balanced(self) -> Choice:
        """Step over to a much better layout, when it is our turn and all is calm."""
        stays = self.today[self.me]
        group, grounds = self._group()
        if any(one.layers is None or one.state == "joining" for one in group):
            return stays, "", 0
        step = next_step(self.shape, group, grounds)
        if step is None or step[0] != self.me:
            return stays, "", 0
        return step[1], "a much better layout", CALM_S / STAGGER_S

    def _group(self) -> tuple[list[Member], list[tuple[list[Member], Slice]]]:
        """The members with whom we make rings: of our region when it holds the whole model, else
        of all regions that do not.
        """
        pairs = list(zip(self.regions, self.grounds, strict=True))
        whole = Slice(0, self.shape.layers)
        for region, ground in pairs:
            if ground == whole and any(one.node == self.me for one in region):
                return region, [(region, ground)]
        parts = [(region, ground) for region, ground in pairs if ground != whole]
        return [one for region, _ in parts for one in region], parts


def turn_of(node: NodeId, count: int) -> int:
    return int.from_bytes(blake2b(node.encode(), digest_size=8).digest()) % count


def _whole(wanted: Wanted, me: NodeId, members: Sequence[Member]) -> Choice:
    """Where engines run all of a slice or nothing, boundaries have to meet."""
    shape = wanted.shape
    held = {one.node: one.layers for one in members if one.layers}
    before = held.get(me)
    if not covered(shape.layers, held.values(), whole=True):
        held = plan(shape, members, whole=True) or held
    for one in members:
        if me in held:
            break
        if one.node not in held:
            chosen = choose_slice(shape.layers, one.capacities, list(held.values()))
            if one.node == me:
                held[me] = chosen  # type: ignore[assignment]
            elif chosen:
                held[one.node] = chosen
    after = held.get(me)
    if after == before or not held:
        return after, "", 0
    others = [one.node for one in members]
    return after, "slices that meet", turn(me, others, len(held)) if before else 0
