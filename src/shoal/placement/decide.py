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
from functools import lru_cache
from hashlib import blake2b

from ..units import NodeId, Slice
from .arrange import FEW, Field, arrange
from .arrange import forget as arrange_forget
from .balance import item_of, laid_of, much_better, next_step
from .choose import choose_slice
from .coverage import covered
from .demand import chosen_model
from .model import Decision, Member, ModelShape, Pool, Wanted
from .plan import plan
from .rates import believed
from .regions import regions, territories

STAGGER_S = 0.3  # between those who want the same
MAX_TURNS = 10
CALM_S = 3.0  # a layout that only could be better has time
BUCKET = 200  # free nodes that think of each other; of more, each bucket spreads by itself


def decide(me: NodeId, pool: Pool) -> Decision:
    """What `me` should hold now. Pure: nodes with the same view decide as one."""
    pool = Pool(pool.wanted, {model: believed(all_) for model, all_ in pool.members.items()})
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
        layers, why, turns = _view(wanted.shape, tuple(here)).choice_of(me)
    wait_s = 0.0 if layers in (None, mine.layers) else turns * STAGGER_S
    return Decision(wanted.model, layers, wait_s, why or reason)


def turn(me: NodeId, others: Sequence[NodeId], about: object) -> int:
    """Our place among those who want the same: another one for each occasion, the same to all."""

    def rank(node: NodeId) -> bytes:
        return blake2b(f"{node} {about}".encode(), digest_size=8).digest()

    mine = rank(me)
    return min(MAX_TURNS, sum(rank(node) < mine for node in others))


Choice = tuple[Slice | None, str, float]  # what, why, how many turns to wait


Held = dict[NodeId, Slice]


class _View:
    """One model in one compute class. All of it is the same to whoever looks, and found once."""

    def __init__(self, shape: ModelShape, members: tuple[Member, ...]) -> None:
        self.shape, self.members = shape, members
        self.today = {one.node: one.layers for one in members if one.layers}
        self.regions = regions(members)
        self.grounds = territories(self.shape, self.regions)
        self._aims: dict[tuple[int, ...], tuple[Held, str]] = {}  # by the buckets of who looks
        self._steps: dict[int | None, tuple[NodeId, Slice] | None] = {}  # by group

    def choice_of(self, me: NodeId) -> Choice:
        held, why = self._aim(me)
        before, after = self.today.get(me), held.get(me)
        if before is None:
            free = [one.node for one in self.members if one.layers is None]
            return after, why, turn(me, free, len(self.today)) if self.today else 0
        if before != after:
            moving = [node for node, part in held.items() if self.today.get(node, part) != part]
            return after, why, 1 + turn(me, moving, len(self.today))
        return self._balanced(me)

    def _aim(self, me: NodeId) -> tuple[Held, str]:
        """What everybody should hold, and why: the same to all, but for many who are free."""
        buckets = tuple(turn_of(me, count) for count in self._buckets())
        if buckets not in self._aims:
            self._aims[buckets] = self._found(buckets)
        return self._aims[buckets]

    def _found(self, buckets: tuple[int, ...]) -> tuple[Held, str]:
        held = self.today | self._free(buckets)
        why = "the weakest layers"
        if not covered(self.shape.layers, held.values()):
            held = self._planned(self.members, held)
            why = "a hole" if covered(self.shape.layers, held.values()) else "what there is"
        if not covered(self.shape.layers, self.today.values()):
            return self._anew(held), why
        return self._made_whole(held), why

    def _free(self, buckets: tuple[int, ...]) -> Held:
        """Where the free nodes stand, each in its own region."""
        found: Held = {}
        quick = sum(one.layers is None for one in self.members) > FEW
        for region, ground, bucket in zip(self.regions, self.grounds, buckets, strict=True):
            free = _bucket([one for one in region if one.layers is None], bucket)
            if free:
                items = [item_of(self.shape, one) for one in free]
                fixed = laid_of(self.shape, region)
                laid = arrange(self.shape.layers, items, fixed, ground, quick=quick)
                found |= {node: one.layers for node, one in laid.items()}
        return found

    def _buckets(self) -> list[int]:
        """How many in each region: one, unless very many are free."""
        counts = (sum(one.layers is None for one in region) for region in self.regions)
        return [max(1, -(-count // BUCKET)) for count in counts]

    def _planned(self, members: Sequence[Member], held: Held) -> Held:
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

    def _anew(self, held: Held) -> Held:
        """While nothing can be served a better layout costs no service: all step over to it."""
        pairs = list(zip(self.regions, self.grounds, strict=True))
        fresh = much_better(self.shape, self.members, pairs, held)
        return held if fresh is None else held | fresh

    def _made_whole(self, held: Held) -> Held:
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

    def _without_gaps(self, found: Held, held: Held) -> Held:
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

    def _balanced(self, me: NodeId) -> Choice:
        """Step over to a much better layout, when it is our turn and all is calm."""
        stays, place = self.today[me], self._place_of(me)
        if place not in self._steps:
            self._steps[place] = self._step(place)
        step = self._steps[place]
        if step is None or step[0] != me:
            return stays, "", 0
        return step[1], "a much better layout", CALM_S / STAGGER_S

    def _step(self, place: int | None) -> tuple[NodeId, Slice] | None:
        """The next one of that group, while nobody joins it."""
        group = self._group(place)
        members = [one for region, _ in group for one in region]
        if any(one.layers is None or one.state == "joining" for one in members):
            return None
        return next_step(self.shape, members, group)

    def _place_of(self, me: NodeId) -> int | None:
        """With whom we make rings: with our region when it holds the whole model, else (None) with
        all regions that do not.
        """
        whole = Slice(0, self.shape.layers)
        for place, (region, ground) in enumerate(zip(self.regions, self.grounds, strict=True)):
            if ground == whole and any(one.node == me for one in region):
                return place
        return None

    def _group(self, place: int | None) -> list[tuple[list[Member], Slice]]:
        pairs = list(zip(self.regions, self.grounds, strict=True))
        if place is not None:
            return [pairs[place]]
        whole = Slice(0, self.shape.layers)
        return [(region, ground) for region, ground in pairs if ground != whole]


@lru_cache(maxsize=16)  # while nothing changes, and where many nodes of one process see the same
def _view(shape: ModelShape, members: tuple[Member, ...]) -> _View:
    return _View(shape, members)


def forget() -> None:
    """As if nothing had been decided yet: for whoever measures how long it takes."""
    _view.cache_clear()
    arrange_forget()


def _bucket(free: list[Member], mine: int) -> list[Member]:
    """Of very many free nodes those who think of each other."""
    if len(free) <= BUCKET:
        return free
    kept: dict[int, list[Member]] = {}
    for one in free:
        kept.setdefault(turn_of(one.node, -(-len(free) // BUCKET)), []).append(one)
    return kept.get(mine) or next(iter(kept.values()))


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
