"""Published rules for placing layers and for routing requests, to compare ours with.

Own implementations of what papers, documentation and code of these projects describe; none of their
code. Each is a pure function of the pool, or a small object that is asked for one route after the
other; `bench/simulate.py` puts them into the simulator in place of ours.

place_by_capacity  Parallax, phase 1: k pipelines by capacity, layers by TFLOPS
DisjointChains     Parallax, phase 2, default: round-robin over chains that share no node
ShortestChain      Parallax, phase 2, "dp": the cheapest chain of slices that meet exactly
place_by_weakest   Petals: the window whose sorted throughputs are smallest, moves at 0.75
ShortestPath       Petals: Dijkstra over servers and blocks
place_evenly       SWARM: equal stages, nodes spread over them by speed
InTurn             SWARM: in each stage the peer whose turn it is, by its mean response time
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from shoal.units import NodeId, Slice

Rtt = Callable[[NodeId | None, NodeId | None], float]  # seconds there and back; None = the client
Placement = dict[NodeId, Slice]
Hops = tuple[tuple[NodeId, Slice], ...]

BALANCE = 0.75  # Petals: the old minimum over the new one, below which a server moves
OVERHEAD_S = 0.018  # Petals: of each hop into a server
NO_ROOM_S = 10.0  # Petals: on a server whose cache is too small for the request
LOAD_S = 0.00005  # Parallax: on a node that runs all the requests that it can
SMOOTHING = 0.2  # SWARM: of the mean response time
ROUNDS = 100  # of moving on until nobody wants to


class NoChain(Exception):
    """No way through all layers."""


@dataclass(frozen=True)
class Peer:
    """A node as these rules see it before it holds anything."""

    node: NodeId
    capacity: int  # layers
    layer_s: float  # of one token in one layer
    tflops: float = 1.0

    @property
    def rate(self) -> float:
        return 1 / self.layer_s


@dataclass(frozen=True)
class Hosted:
    """A node that serves."""

    node: NodeId
    layers: Slice
    layer_s: float
    sessions: int = 0
    free_tokens: int = 1 << 40
    most_sessions: int = 1 << 20


# ---- Parallax


def place_by_capacity(layers: int, peers: Sequence[Peer], *, spare: bool = True) -> Placement:
    """Chains of nodes by capacity, as many as the score k^2 / stages favours, each split by TFLOPS.

    The nodes left over take, each in turn, what they can hold from the layer with the least
    capacity behind it (as behind the "dp" router), or wait when `spare` is False (as behind the
    default one). Raises NoChain when not one chain comes about.
    """
    ranked = sorted(peers, key=lambda peer: (-peer.capacity, peer.node))
    options = [_chains(layers, ranked, most) for most in range(1, len(peers) + 1)]
    chains = max(options, key=_score)
    if not chains:
        raise NoChain(f"{sum(p.capacity for p in peers)} layers of room for {layers}")
    placed: Placement = {}
    for chain in chains:
        placed.update(_in_order(chain, water_fill(layers, chain)))
    if spare:
        _add_spare(layers, ranked, placed)
    return placed


def _score(chains: Sequence[Sequence[Peer]]) -> float:
    return len(chains) ** 2 / sum(map(len, chains)) if chains else 0.0


def _chains(layers: int, ranked: Sequence[Peer], most: int) -> list[list[Peer]]:
    """Greedy: the largest first; the last place goes to the smallest node that fills it, as long as
    what remains could still be a chain.
    """
    free = [peer for peer in ranked if peer.capacity > 0]
    chains: list[list[Peer]] = []
    while len(chains) < most and sum(peer.capacity for peer in free) >= layers:
        chain: list[Peer] = []
        missing = layers
        while missing > 0:
            chain.append(_next(free, missing, layers))
            missing -= chain[-1].capacity
        chains.append(chain)
    return chains


def _next(free: list[Peer], missing: int, layers: int) -> Peer:
    closing = [peer for peer in free if peer.capacity >= missing]
    room = sum(peer.capacity for peer in free)
    smallest = closing[-1] if closing else free[0]
    chosen = smallest if room - smallest.capacity >= layers else (closing or free)[0]
    free.remove(chosen)
    return chosen


def water_fill(layers: int, chain: Sequence[Peer]) -> list[int]:
    """Layers by TFLOPS, none above its capacity, rounded by largest remainder."""
    low, high = 0.0, layers / min(peer.tflops for peer in chain)
    for _ in range(60):
        level = (low + high) / 2
        held = sum(min(peer.capacity, level * peer.tflops) for peer in chain)
        low, high = (level, high) if held < layers else (low, level)
    exact = [min(float(peer.capacity), high * peer.tflops) for peer in chain]
    counts = [math.floor(each + 1e-9) for each in exact]
    by_remainder = sorted(range(len(chain)), key=lambda i: (counts[i] - exact[i], i))
    while sum(counts) < layers:
        room = [i for i in by_remainder if counts[i] < chain[i].capacity]
        for i in room[: layers - sum(counts)]:
            counts[i] += 1
    return counts


def _in_order(chain: Sequence[Peer], counts: Sequence[int]) -> Iterator[tuple[NodeId, Slice]]:
    start = 0
    for peer, count in zip(chain, counts, strict=True):
        if count:
            yield peer.node, Slice(start, start + count)
        start += count


def _add_spare(layers: int, ranked: Sequence[Peer], placed: Placement) -> None:
    behind = [0] * layers
    room = {peer.node: peer.capacity for peer in ranked}
    for node, part in placed.items():
        for layer in part:
            behind[layer] += room[node]
    for peer in ranked:
        if peer.node in placed or not peer.capacity:
            continue
        start = min(range(layers), key=lambda layer: (behind[layer], layer))
        part = Slice(start, min(layers, start + peer.capacity))
        placed[peer.node] = part
        for layer in part:
            behind[layer] += peer.capacity


class DisjointChains:
    """Chains that share no node, the cheapest first; requests take them in turn.

    A chain whose node is full is passed over; when all are, the request has to wait.
    """

    def __init__(self, layers: int, rtt: Rtt) -> None:
        self._layers, self._rtt, self._turn = layers, rtt, 0

    def choose(self, hosted: Sequence[Hosted], need_tokens: int) -> Hops:
        """Raises NoChain when there is none with room."""
        chains = self.chains(hosted)
        for _ in chains:
            chain = chains[self._turn % len(chains)]
            self._turn += 1
            if all(has_room(one, need_tokens) for one in chain):
                return tuple((one.node, one.layers) for one in chain)
        raise NoChain("every chain is full" if chains else "no chain")

    def chains(self, hosted: Sequence[Hosted]) -> list[list[Hosted]]:
        free = list(hosted)
        chains: list[list[Hosted]] = []
        while chain := cheapest_chain(self._layers, free, self._rtt, load=False):
            chains.append(chain)
            free = [one for one in free if one not in chain]
        return chains


class ShortestChain:
    """The cheapest chain of slices that meet exactly.

    As published: a node costs the time of one layer however many it runs, each edge a whole round
    trip, the way back nothing, load next to nothing until a node is full.
    """

    def __init__(self, layers: int, rtt: Rtt) -> None:
        self._layers, self._rtt = layers, rtt

    def choose(self, hosted: Sequence[Hosted], need_tokens: int) -> Hops:
        """Raises NoChain when there is none with room."""
        fit = [one for one in hosted if has_room(one, need_tokens)]
        chain = cheapest_chain(self._layers, fit, self._rtt, load=True)
        if not chain:
            raise NoChain("no chain with room")
        return tuple((one.node, one.layers) for one in chain)


def has_room(one: Hosted, need_tokens: int) -> bool:
    return one.free_tokens >= need_tokens and one.sessions < one.most_sessions


def cheapest_chain(
    layers: int, hosted: Sequence[Hosted], rtt: Rtt, *, load: bool
) -> list[Hosted] | None:
    """Shortest path over slices with matching ends; None when there is none."""
    best: dict[NodeId, tuple[float, Hosted | None]] = {}
    ordered = sorted(hosted, key=lambda one: (one.layers, one.node))
    for one in ordered:
        own = one.layer_s + (LOAD_S * one.sessions / one.most_sessions if load else 0.0)
        if one.layers.start == 0:
            best[one.node] = own, None
            continue
        before = [other for other in ordered if other.layers.stop == one.layers.start]
        ways = [
            (best[other.node][0] + rtt(other.node, one.node) + own, other)
            for other in before
            if other.node in best
        ]
        if ways:
            best[one.node] = min(ways, key=lambda way: (way[0], way[1].node))
    ends = [one for one in ordered if one.layers.stop == layers and one.node in best]
    if not ends:
        return None
    at: Hosted | None = min(ends, key=lambda one: (best[one.node][0], one.node))
    chain: list[Hosted] = []
    while at is not None:
        chain.append(at)
        at = best[at.node][1]
    return chain[::-1]


# ---- Petals


def place_by_weakest(layers: int, peers: Sequence[Peer]) -> tuple[Placement, int]:
    """Nodes arrive in the order given; afterwards they move as long as anybody wants to.

    Also how many moves that took, each of which loads a slice.
    """
    placed: Placement = {}
    known = {peer.node: peer for peer in peers}
    for peer in peers:
        if peer.capacity:
            placed[peer.node] = weakest_window(peer, block_rates(layers, placed, known))
    moves = 0
    for _ in range(ROUNDS):
        moved = [node for node in sorted(placed) if _moves(layers, known[node], placed, known)]
        moves += len(moved)
        if not moved:
            break
    return placed, moves


def claim(peer: Peer, count: int) -> float:
    """The throughput that a server of `count` blocks announces: what it has in the mean, when
    requests enter it anywhere.
    """
    return peer.rate / ((count + 1) / 2)


def block_rates(
    layers: int, placed: Mapping[NodeId, Slice], known: Mapping[NodeId, Peer]
) -> list[float]:
    """Of each block the sum over its servers, added in the order of their ids."""
    rates = [0.0] * layers
    for node in sorted(placed):
        for layer in placed[node]:
            rates[layer] += claim(known[node], len(placed[node]))
    return rates


def weakest_window(peer: Peer, rates: Sequence[float]) -> Slice:
    """The window whose throughputs, sorted, are lexicographically smallest; the first of equals."""
    count = min(peer.capacity, len(rates))
    starts = range(len(rates) - count + 1)
    start = min(starts, key=lambda at: (sorted(rates[at : at + count]), at))
    return Slice(start, start + count)


def _moves(layers: int, peer: Peer, placed: Placement, known: Mapping[NodeId, Peer]) -> bool:
    """Move `peer` where that is worth it: the others are then let respond until nobody moves, and
    the smallest throughput of before must be under 0.75 of that of after.
    """
    before = min(block_rates(layers, placed, known))
    trial = dict(placed)
    if not _respond(layers, peer, trial, known):
        return False
    if min(block_rates(layers, trial, known)) <= 0 < before:
        return False  # it would disconnect the swarm
    target = trial[peer.node]
    for _ in range(ROUNDS):
        others = [known[node] for node in sorted(trial) if node != peer.node]
        if not any([_respond(layers, other, trial, known) for other in others]):
            break
    after = min(block_rates(layers, trial, known))
    if after <= 0 or before / after >= BALANCE:
        return False
    placed[peer.node] = target
    return True


def _respond(layers: int, peer: Peer, placed: Placement, known: Mapping[NodeId, Peer]) -> bool:
    """Its best window, its own share taken away a little more than whole, so that a tie stays."""
    old = placed[peer.node]
    rates = block_rates(layers, placed, known)
    for layer in old:
        rates[layer] -= claim(peer, len(old)) * (1 + 1e-3)
    placed[peer.node] = weakest_window(peer, rates)
    return placed[peer.node] != old


class ShortestPath:
    """Least expected latency of a token, queues unseen: half a round trip and an overhead into each
    server, the time of each block, ten seconds where the cache is too small.

    Whoever enters a server stays to the end of its span.
    """

    def __init__(self, layers: int, rtt: Rtt) -> None:
        self._layers, self._rtt = layers, rtt

    def choose(self, hosted: Sequence[Hosted], need_tokens: int) -> Hops:
        """Raises NoChain when blocks are missing."""
        ahead: list[tuple[float, int, NodeId | None, Hops]] = [(0.0, 0, None, ())]
        done: set[tuple[int, NodeId | None]] = set()
        arriving = self._layers + 1
        while ahead:
            cost, at, here, hops = heapq.heappop(ahead)
            if at == arriving:
                return hops
            if (at, here) in done:
                continue
            done.add((at, here))
            if at == self._layers:
                heapq.heappush(ahead, (cost + self._rtt(here, None) / 2, arriving, None, hops))
            for one in hosted:
                if one.layers.start <= at < one.layers.stop and one.node != here:
                    part = Slice(at, one.layers.stop)
                    way = self._rtt(here, one.node) / 2 + OVERHEAD_S + self._span_s(one, part)
                    way += NO_ROOM_S if one.free_tokens < 2 * need_tokens else 0.0
                    step = (*hops, (one.node, part))
                    heapq.heappush(ahead, (cost + way, part.stop, one.node, step))
        raise NoChain("blocks are missing")

    @staticmethod
    def _span_s(one: Hosted, part: Slice) -> float:
        return one.layer_s * len(part)


# ---- SWARM


def place_evenly(layers: int, peers: Sequence[Peer]) -> Placement:
    """Stages of equal length, no longer than the smallest node can hold; each node goes, fastest
    first, to the stage that has the least speed so far. Raises NoChain when there are too few.
    """
    usable = [peer for peer in peers if peer.capacity]
    length = min((peer.capacity for peer in usable), default=0)
    count = math.ceil(layers / length) if length else 1
    if not usable or len(usable) < count:
        raise NoChain(f"{count} stages for {len(usable)} nodes")
    ends = [layers * stage // count for stage in range(count + 1)]
    speeds = [0.0] * count
    placed: Placement = {}
    for peer in sorted(usable, key=lambda peer: (-peer.rate, peer.node)):
        stage = min(range(count), key=lambda at: (speeds[at], at))
        speeds[stage] += peer.rate
        placed[peer.node] = Slice(ends[stage], ends[stage + 1])
    return placed


@dataclass
class InTurn:
    """Interleaved weighted round-robin, by one sender for each stage: the peer with the smallest
    priority, to which its mean response time is added.

    Of this sender's own requests alone: it does not see what others send, nor what comes after.
    """

    layers: int
    priority: dict[NodeId, float] = field(default_factory=lambda: defaultdict(float))
    mean_s: dict[NodeId, float] = field(default_factory=dict)

    def choose(self, hosted: Sequence[Hosted], need_tokens: int) -> Hops:
        """Raises NoChain when a stage has nobody."""
        hops: list[tuple[NodeId, Slice]] = []
        at = 0
        while at < self.layers:
            stage = [one for one in hosted if one.layers.start == at]
            if not stage:
                raise NoChain(f"nobody at layer {at}")
            fit = [one for one in stage if one.free_tokens >= need_tokens] or stage
            chosen = min(fit, key=lambda one: (self._priority(one, fit), one.node))
            took = self.mean_s.get(chosen.node, chosen.layer_s * len(chosen.layers))
            self.priority[chosen.node] += took
            hops.append((chosen.node, chosen.layers))
            at = chosen.layers.stop
        return tuple(hops)

    def _priority(self, one: Hosted, stage: Sequence[Hosted]) -> float:
        """A newcomer starts where the others are, not with all their past to make up for."""
        if one.node not in self.priority:
            others = [self.priority[each.node] for each in stage if each.node in self.priority]
            self.priority[one.node] = min(others, default=0.0)
        return self.priority[one.node]

    def responded(self, node: NodeId, seconds: float) -> None:
        """A peer was seen to take so long."""
        before = self.mean_s.get(node, seconds)
        self.mean_s[node] = before + SMOOTHING * (seconds - before)


def meets(layers: int, hops: Hops) -> bool:
    """Whether these hops are the whole model, in order."""
    parts = [part for _, part in hops]
    joined = all(a.stop == b.start for a, b in pairwise(parts))
    return bool(parts) and joined and parts[0].start == 0 and parts[-1].stop == layers
