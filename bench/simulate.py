"""The published clusters in the simulator: our placement and routing, and the rules of others.

Every cell is a cluster, a model and a load; every rule places the layers and routes the requests of
the same cell, over the same links and machines, in virtual time. Offline keeps as many requests in
flight as their KV caches hold; online they arrive at the rate that Helix was fed.

    python bench/simulate.py --quick
    python bench/simulate.py --json simulate.json
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import Any, Literal

import clusters
import rules
from clusters import CLUSTERS, KV_TOKENS, Cluster, Profile
from contract import Bench, percentile

from shoal.errors import NoRoute
from shoal.events import RouteTaken, StageChanged
from shoal.pipeline import Plan, Planner, Stop
from shoal.pipeline.plans import Wish
from shoal.placement.bound import Flow, Traffic, Worker, max_flow
from shoal.sim.asked import Asked
from shoal.sim.engine import by_profile, more_bytes
from shoal.sim.loop import run
from shoal.sim.machine import Machine
from shoal.sim.node import SimNode
from shoal.sim.world import World, identity_of
from shoal.transport import Frame
from shoal.transport.memory import MemoryNetwork
from shoal.transport.memory import Path as LinkPath
from shoal.units import NodeId, Slice

Mode = Literal["offline", "online"]
FULL = 0.85  # of the KV room, by what requests are expected to need: Helix's mark
EXPECTED_ANSWER = 240
CALM_S = 120.0
PRIMING_S = 20.0  # in which requests come that are taken for begun long ago
AGAIN_S = 5.0  # a client that was sent away comes again
CLIENT = "client"
OURS = "shoal"


@dataclass(frozen=True)
class Cell:
    cluster: str
    model: str
    mode: Mode
    rule: str
    warm_s: float
    window_s: float
    seed: int = 1

    @property
    def title(self) -> str:
        """As Helix's figures are named."""
        return f"{self.cluster} {self.model.removeprefix('llama-')}"

    @property
    def named(self) -> str:
        return f"{self.title} {self.mode}, {self.rule}"

    @property
    def site(self) -> Cluster:
        return CLUSTERS[self.cluster]

    @property
    def profiles(self) -> Mapping[str, Profile]:
        return clusters.profiles(self.model)


# ---- what each rule does


Place = Callable[[Cell, Sequence[rules.Peer]], rules.Placement]


@dataclass(frozen=True)
class Rule:
    """`place` is None where the nodes decide, and move, by themselves; `route` is None for our own
    routing.
    """

    place: Place | None
    route: Callable[[int, rules.Rtt], Any] | None


def _layers(cell: Cell) -> int:
    return clusters.sim_model(cell.model).layers


def _chains(cell: Cell, peers: Sequence[rules.Peer]) -> rules.Placement:
    return rules.place_by_capacity(_layers(cell), peers, spare=False)


def _capacity(cell: Cell, peers: Sequence[rules.Peer]) -> rules.Placement:
    return rules.place_by_capacity(_layers(cell), peers)


def _weakest(cell: Cell, peers: Sequence[rules.Peer]) -> rules.Placement:
    return rules.place_by_weakest(_layers(cell), peers)[0]


def _evenly(cell: Cell, peers: Sequence[rules.Peer]) -> rules.Placement:
    return rules.place_evenly(_layers(cell), peers)


def _published(cell: Cell, peers: Sequence[rules.Peer]) -> rules.Placement:
    """What Helix's solver found, machine by machine."""
    solved = clusters.placement(cell.title)
    if not solved:
        raise rules.NoChain("Helix's placement of this cell was not found")
    nodes = zip(cell.site.nodes, peers, strict=True)
    waiting: dict[str, list[NodeId]] = {}
    for (_, kind, _), peer in nodes:
        waiting.setdefault(kind, []).append(peer.node)
    return {waiting[kind].pop(0): part for kind, part in solved}


RULES: Mapping[str, Rule] = {
    OURS: Rule(None, None),
    "helix placement, our routing": Rule(_published, None),
    "parallax chains": Rule(_chains, rules.DisjointChains),
    "parallax capacity": Rule(_capacity, rules.ShortestChain),
    "petals": Rule(_weakest, rules.ShortestPath),
    "swarm": Rule(_evenly, lambda layers, rtt: rules.InTurn(layers)),
}
RIVALS = ("parallax chains", "parallax capacity", "petals", "swarm")


class RuledPlanner:
    """Asks a rule for the route, and takes any with full caches rather than none."""

    def __init__(self, node: SimNode, router: Any, model: str) -> None:
        self._node, self._router = node, router
        self._model = node.around.models[model]

    def __call__(self, wish: Wish) -> Plan:
        hosted = [one for one in self._hosted() if one.node not in wish.avoid]
        try:
            hops = self._choose(hosted, wish.need_tokens)
        except rules.NoChain as error:
            raise NoRoute(str(error)) from None
        stops = tuple(Stop(node, part) for node, part in hops)
        return Plan(self._model.model_id, self._model.dtype, stops)

    def _choose(self, hosted: Sequence[rules.Hosted], need_tokens: int) -> rules.Hops:
        try:
            hops: rules.Hops = self._router.choose(hosted, need_tokens)
        except rules.NoChain:
            roomy = [replace(one, free_tokens=1 << 40) for one in hosted]
            hops = self._router.choose(roomy, 0)
        return hops

    def _hosted(self) -> Iterator[rules.Hosted]:
        for announcement in self._node.membership.view.announcements():
            for offer in announcement.stages:
                if offer.state == "serving":
                    speed, load = offer.speed, 1 + offer.queue
                    yield rules.Hosted(
                        announcement.node,
                        offer.layers,
                        speed.layer_s * load,
                        offer.sessions,
                        offer.free_tokens,
                    )


def peers_of(cell: Cell, names: Mapping[str, NodeId]) -> list[rules.Peer]:
    mixture = clusters.mean_lengths()
    return [
        rules.Peer(
            names[name],
            cell.profiles[kind].max_layers,
            cell.profiles[kind].per_token_s(mixture, batch=16),
            clusters.TFLOPS[kind],
        )
        for name, kind, _ in cell.site.nodes
    ]


# ---- one run


def machine(
    cell: Cell, kind: str, region: str, pinned: Slice | None, priming: Callable[[], bool]
) -> Machine:
    """While `priming`, prompts take no time."""
    profile, model = cell.profiles[kind], clusters.sim_model(cell.model)

    def layer_s(decoding: int, prompt_tokens: int, context: int) -> float:
        return profile.layer_s(decoding, 0 if priming() else prompt_tokens)

    return Machine(
        memory_bytes=profile.memory_bytes(cell.model),
        capability=clusters.capability(cell.model, kind),
        speed=lambda of, layers: profile.speed,
        timing=lambda of, layers: by_profile(layer_s),
        models=(model,),
        pinned=pinned,
        reserve_tokens=kv_tokens(cell),
        gateway=False,
        region=region,
        exact=False,
    )


def kv_tokens(cell: Cell) -> int:
    """The room that each node keeps, by its setting."""
    fewest = min(
        cell.profiles[kind].kv_tokens(cell.profiles[kind].max_layers)
        for _, kind, _ in cell.site.nodes
    )
    return fewest if cell.site.crowded else KV_TOKENS[cell.model]


def outsider(region: str) -> Machine:
    """Where requests come in: it holds nothing."""
    return Machine(memory_bytes=0, region=region, exact=False)


class Run:
    """A cell in the making: `await` it in a loop whose time jumps."""

    def __init__(self, cell: Cell) -> None:
        self.cell, self.model = cell, clusters.sim_model(cell.model)
        self.chance = random.Random(cell.seed)
        nodes = cell.site.nodes
        order = [CLIENT, *(name for name, _, _ in nodes)]
        self.ids = {name: identity_of(cell.seed, at + 1).node for at, name in enumerate(order)}
        regions = {CLIENT: CLIENT, **{name: region for name, _, region in nodes}}
        self.region = {self.ids[name]: region for name, region in regions.items()}
        self.rule = RULES[cell.rule]
        self.placed: rules.Placement = {}
        self.priming = False

    def network(self) -> MemoryNetwork:
        return MemoryNetwork(seed=self.cell.seed, paths=self.path, weigh=self.weigh)

    def weigh(self, frame: Frame) -> int:
        return 0 if self.priming else more_bytes(frame)

    def path(self, a: NodeId, b: NodeId) -> LinkPath:
        """The same for a pair in every run."""
        chance = random.Random(f"{self.cell.seed} {sorted((a, b))}")
        return self.cell.site.path(self.region[a], self.region[b], chance)

    def rtt(self, a: NodeId | None, b: NodeId | None) -> float:
        client = self.ids[CLIENT]
        return 2 * self.path(a or client, b or client).delay_s

    def planner(self, node: SimNode) -> Planner:
        if self.rule.route is None:
            return node.router.plan
        router = self.rule.route(self.model.layers, self.rtt)
        return RuledPlanner(node, router, self.model.name)

    async def __call__(self) -> dict[str, Any]:
        """Everything of one cell and rule; NoChain where the rule finds no placement."""
        if self.rule.place is not None:
            self.placed = self.rule.place(self.cell, peers_of(self.cell, self.ids))
        world = World(
            [self.model],
            seed=self.cell.seed,
            network=self.network(),
            make_planner=self.planner,
        )
        async with world:
            await self._start(world)
            settled_s = asyncio.get_running_loop().time()
            held = self._held(world)
            await self._load(world, held)
            return self._result(world, held, settled_s)

    async def _start(self, world: World) -> None:
        await world.join(outsider(CLIENT), CLIENT)
        for name, kind, region in self.cell.site.nodes:
            pinned = self.placed.get(self.ids[name])
            if self.rule.place is None or pinned is not None:
                await world.join(
                    machine(self.cell, kind, region, pinned, lambda: self.priming), name
                )
        await world.until(lambda: world.is_served(self.model.name), limit_s=3600)
        loaded = -1
        while world.loaded_bytes() != loaded:  # until nobody moves any more
            loaded = world.loaded_bytes()
            await asyncio.sleep(CALM_S)

    def _held(self, world: World) -> dict[str, Slice]:
        return {
            name: served.layers
            for name, node in world.nodes.items()
            for served in node.serving.slices
        }

    # ---- requests

    async def _load(self, world: World, held: Mapping[str, Slice]) -> None:
        self.begin_s = asyncio.get_running_loop().time()
        stop_s = self.begin_s + self.cell.warm_s + self.cell.window_s
        sizes = clusters.sizes(self.chance)
        if self.cell.mode == "offline":
            self.priming = True
            asyncio.get_running_loop().call_later(PRIMING_S, self._primed)
            asking = [
                asyncio.ensure_future(self._one_after_the_other(world, sizes, at * 0.01))
                for at in range(in_flight(self.cell, held))
            ]
        else:
            asking = [asyncio.ensure_future(self._arriving(world, sizes))]
        await asyncio.sleep(stop_s - asyncio.get_running_loop().time())
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)

    def _primed(self) -> None:
        self.priming = False

    async def _one_after_the_other(
        self, world: World, sizes: Iterator[tuple[int, int]], after_s: float
    ) -> None:
        """The first of them is as if it had begun long ago: its prompt costs nothing, a part of its
        answer is left, and long answers are more often met in the middle.
        """
        await asyncio.sleep(after_s)
        known = clusters.lengths()
        ((prompt, answer),) = self.chance.choices(known, [answer for _, answer in known])
        asked = await self._ask(world, prompt, 1 + int(answer * self.chance.random()))
        while True:
            if asked.error is not None:
                await asyncio.sleep(AGAIN_S)
            asked = await self._ask(world, *next(sizes))

    async def _arriving(self, world: World, sizes: Iterator[tuple[int, int]]) -> None:
        fed = clusters.printed(self.cell.title).get("online", {}).get("fed", {}).get("helix", 500)
        mixture = clusters.mean_lengths()
        rate = fed / (mixture.prompt + mixture.answer)
        async with asyncio.TaskGroup() as group:
            while True:
                await asyncio.sleep(self.chance.expovariate(rate))
                group.create_task(self._ask(world, *next(sizes)))

    async def _ask(self, world: World, prompt: int, answer: int) -> Asked:
        """The first token comes with the prompt: Helix counts those after it. No two prompts begin
        alike, or they would be found in the caches.
        """
        ids = [self.chance.randrange(self.model.vocab_size) for _ in range(min(3, prompt))]
        ids += [0] * (prompt - len(ids))
        return await world.ask(self.model.name, ids, answer + 1, gateway=CLIENT)

    # ---- what came out

    def _result(self, world: World, held: Mapping[str, Slice], settled_s: float) -> dict[str, Any]:
        start_s = self.begin_s + self.cell.warm_s
        stop_s = start_s + self.cell.window_s
        came = [asked.came_s for asked in world.asked]
        decoded = sum(start_s <= at <= stop_s for times in came for at in times[1:])
        first = [
            asked.came_s[0] - asked.at_s
            for asked in world.asked
            if asked.came_s and start_s <= asked.came_s[0] <= stop_s
        ]
        gaps = [
            after - before
            for times in came
            for before, after in itertools.pairwise(times)
            if start_s <= after <= stop_s
        ]
        return {
            "tokens_per_s": decoded / self.cell.window_s,
            "ttft_s": first,
            "gaps_s": gaps,
            "errors": sum(asked.error is not None for asked in world.asked),
            "error_kinds": [repr(asked.error)[:90] for asked in world.asked if asked.error],
            "settled_s": settled_s,
            "held": dict(held),
            "in_flight": (count := in_flight(self.cell, held)),
            "bound": bound_of(self.cell, held, count).tokens_per_s,
            "max_flow": max_flow_of(self.cell, held).tokens_per_s,
            "stages": statistics.mean(stages) if (stages := self._stages(world)) else 0.0,
            "moves": loads(world) - len(held),
            "loaded_bytes": world.loaded_bytes(),
        }

    @staticmethod
    def _stages(world: World) -> list[int]:
        """Of each route that was taken."""
        taken = (event for _, _, event in world.log if isinstance(event, RouteTaken))
        return [len(event.route) for event in taken]


def loads(world: World) -> int:
    """How often a stage came into service."""
    changes = [event for _, _, event in world.log if isinstance(event, StageChanged)]
    return sum(change.state == "serving" for change in changes)


def in_flight(cell: Cell, held: Mapping[str, Slice]) -> int:
    """As many requests as the scarcest layer's KV room is thought to hold."""
    kinds = {name: kind for name, kind, _ in cell.site.nodes}
    model, room = clusters.sim_model(cell.model), [0.0] * clusters.sim_model(cell.model).layers
    for name, part in held.items():
        memory = cell.profiles[kinds[name]].memory_bytes(cell.model)
        free = memory - len(part) * clusters.LAYER_BYTES[cell.model]
        for layer in part:
            room[layer] += free / (len(part) * model.kv_bytes)
    each = clusters.mean_lengths().prompt + EXPECTED_ANSWER
    return max(1, int(FULL * min(room) / each))


def max_flow_of(cell: Cell, held: Mapping[str, Slice]) -> Flow:
    """The most that this placement can carry when every step has as many tokens as the stage's KV
    room holds requests, MAX_BATCH at most: as if enough of them could be everywhere at once.
    """
    kinds = {name: kind for name, kind, _ in cell.site.nodes}
    mixture, model = clusters.mean_lengths(), clusters.sim_model(cell.model)
    workers = []
    for name, part in sorted(held.items()):
        profile = cell.profiles[kinds[name]]
        free = profile.memory_bytes(cell.model) - len(part) * clusters.LAYER_BYTES[cell.model]
        room = free / (len(part) * model.kv_bytes) / (mixture.prompt + mixture.answer)
        batch = max(1.0, min(clusters.MAX_BATCH, room))
        workers.append(Worker(NodeId(name), part, profile.per_token_s(mixture, batch)))
    return max_flow(model.layers, workers, bandwidth_of(cell), Traffic(bytes=bytes_each(cell)))


def bytes_each(cell: Cell) -> float:
    """What a token of an answer sends over each link, where that can bind."""
    activations = clusters.sim_model(cell.model).activation_bytes
    return clusters.mean_lengths().traffic(activations).bytes if cell.site.wide else 0.0


def bandwidth_of(cell: Cell) -> Callable[[NodeId, NodeId], float]:
    regions = {name: region for name, _, region in cell.site.nodes}
    return lambda a, b: 1.25e9 if regions[a] == regions[b] else 15e6


def bound_of(cell: Cell, held: Mapping[str, Slice], in_flight: float) -> Flow:
    """The most that this placement can carry with so many requests at once, batches as large as
    they come: no queue, no step that is less than full, no route that is less than best.
    """
    kinds = {name: kind for name, kind, _ in cell.site.nodes}
    mixture, model = clusters.mean_lengths(), clusters.sim_model(cell.model)
    workers = []
    for name, part in sorted(held.items()):
        step_s, token_s = cell.profiles[kinds[name]].cheapest(mixture)
        workers.append(Worker(NodeId(name), part, token_s, step_s=step_s))
    hops_s = 2 * (0.040 if cell.site.wide else 0.001)  # at least there and back to the client
    traffic = Traffic(bytes=bytes_each(cell), in_flight=in_flight, hops_s=hops_s)
    return max_flow(model.layers, workers, bandwidth_of(cell), traffic)


def simulate(cell: Cell) -> dict[str, Any]:
    """One cell in this process."""
    began = time.monotonic()
    try:
        result: dict[str, Any] = run(Run(cell), limit_s=1e6)
    except rules.NoChain as error:
        return {"cell": cell, "absent": str(error)}
    return {"cell": cell, "wall_s": time.monotonic() - began, **result}


# ---- the benchmark

ALL = tuple(RULES)
FEW = (OURS, "helix placement, our routing", "swarm")
CELLS: Sequence[tuple[str, str, Mode, Sequence[str]]] = (  # the most telling ones first
    ("single", "llama-70b", "offline", ALL),
    ("geo", "llama-70b", "offline", ALL),
    ("mixed", "llama-70b", "offline", FEW),
    ("single", "llama-30b", "offline", ALL),
    ("single", "llama-70b", "online", FEW),
    ("geo", "llama-70b", "online", FEW),
    ("two", "llama-70b", "offline", ALL),
    ("geo", "llama-30b", "offline", ALL),
    ("mixed", "llama-70b", "online", FEW),
)
QUICK: Sequence[tuple[str, str, Mode, Sequence[str]]] = (
    ("single", "llama-30b", "offline", (OURS, "swarm")),
)
WARM_S, WINDOW_S = 45.0, 40.0  # Helix: 60 and 600 offline, 0 and 1800 online
ONLINE_S = 60.0  # of warming up: requests begin with none before them


def cells(quick: bool, only: str) -> list[Cell]:
    every = [
        Cell(
            cluster,
            model,
            mode,
            rule,
            (ONLINE_S if mode == "online" else WARM_S) if not quick else 25.0,
            WINDOW_S if not quick else 15.0,
        )
        for cluster, model, mode, some in (QUICK if quick else CELLS)
        for rule in some
    ]
    return [cell for cell in every if only in f"{cell.title} {cell.mode} {cell.rule}"]


def simulated(wanted: Sequence[Cell], processes: int, seconds: float) -> list[dict[str, Any]]:
    """All cells, side by side; those that have not begun after so many seconds are left out."""
    stop_at = time.monotonic() + seconds
    results = []
    with ProcessPoolExecutor(processes, max_tasks_per_child=1) as pool:
        begun = [pool.submit(simulate_until, cell, stop_at) for cell in wanted]
        for future in as_completed(begun):
            results.append(result := future.result())
            said = result.get("absent") or f"{result['tokens_per_s']:.1f} tokens/s"
            print(f"{result['cell'].named}: {said}", file=sys.stderr, flush=True)
    return sorted(results, key=lambda result: wanted.index(result["cell"]))


def simulate_until(cell: Cell, stop_at: float) -> dict[str, Any]:
    if time.monotonic() > stop_at:
        return {"cell": cell, "absent": "no time was left"}
    return simulate(cell)


def report(bench: Bench, result: Mapping[str, Any]) -> None:
    cell: Cell = result["cell"]
    what = cell.named
    if "absent" in result:
        bench.absent(what, result["absent"])
        return
    bench.row(
        what=what,
        tokens_per_s=result["tokens_per_s"],
        helix=helix(cell),
        max_flow=result["max_flow"],
        of_flow=result["tokens_per_s"] / max(result["max_flow"], 1e-9),
        bound_in_flight=result["bound"],
        of_bound=result["tokens_per_s"] / max(result["bound"], 1e-9),
        stages=result["stages"],
        ttft_p50_s=_percentile(result["ttft_s"], 50),
        ttft_p95_s=_percentile(result["ttft_s"], 95),
        gap_p50_s=_percentile(result["gaps_s"], 50),
        gap_p95_s=_percentile(result["gaps_s"], 95),
        in_flight=result["in_flight"],
        failed=result["errors"],
        loaded_gb=result["loaded_bytes"] / 1e9,
        moves=result["moves"],
        wall_s=result["wall_s"],
    )


def helix(cell: Cell) -> float | None:
    said = clusters.printed(cell.title).get(cell.mode, {}).get("helix", {})
    tokens_per_s: float | None = said.get("decode_tokens_per_s")
    return tokens_per_s


def _percentile(samples: Sequence[float], percent: float) -> float | None:
    return percentile(samples, percent) if samples else None


def aims(bench: Bench, results: Sequence[Mapping[str, Any]]) -> None:
    done = [result for result in results if "absent" not in result]
    reached = {result["cell"]: result["tokens_per_s"] for result in done}
    for result in done:
        cell: Cell = result["cell"]
        if cell.rule != OURS:
            continue
        name, ours = f"{cell.title} {cell.mode}", result["tokens_per_s"]
        if cell.mode == "offline":
            share = ours / max(result["max_flow"], 1e-9)
            bench.aim(
                f"{name}: of the placement's max flow", ">= 0.9", got=share, holds=share >= 0.9
            )
        if (said := helix(cell)) is not None:
            bench.aim(f"{name}: over Helix", ">= 1", got=ours / said, holds=ours >= said)
        others = [reached.get(replace(cell, rule=rule), 0.0) for rule in RIVALS]
        best = max(others, default=0.0)
        if best:
            bench.aim(f"{name}: over the best rule", ">= 1", got=ours / best, holds=ours >= best)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help='cells whose title has this, as "geo 70b"')
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=22.0, help="no cell is begun after these")
    bench = Bench("simulate", __doc__, parser=parser)
    wanted = cells(bench.quick, bench.options.only)
    results = simulated(wanted, bench.options.processes, 60 * bench.options.minutes)
    for result in results:
        report(bench, result)
    aims(bench, results)
    bench.finish()


if __name__ == "__main__":
    main()
