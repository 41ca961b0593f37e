"""A whole mesh in one object, driven by one seed: the real session and generation code, a toy
model, no clock.

The toy model keeps a real paged cache: a layer's output at a position depends on all the layer's
inputs so far, read back from the pages. A page that is given away too early, or shared with whom it
does not belong to, a row that is lost, doubled or out of order changes the text.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from shoal.engine.draft import Wish
from shoal.engine.prefix import PrefixPool
from shoal.engine.request import Sampled, Sampling
from shoal.errors import NoRoute, ShoalError
from shoal.events import PrefixMatched, SessionPreempted
from shoal.pipeline.generation import (
    Deliver,
    FindRoute,
    Finish,
    Generation,
    GenerationConfig,
    Plan,
    Request,
    Stop,
    Tell,
)
from shoal.pipeline.generation import Wish as RouteWish
from shoal.pipeline.messages import (
    Close,
    Go,
    Leaving,
    Lost,
    Open,
    Opened,
    Preempted,
    Refused,
    Resume,
    Step,
    Tokens,
)
from shoal.pipeline.stage import (
    Connect,
    Drop,
    Enqueue,
    Forward,
    Note,
    Replay,
    Send,
    StageSessions,
    StageSessionsConfig,
)
from shoal.units import ModelId, NodeId, SessionId, Slice

LAYERS, VOCABULARY, PAGE = 6, 97, 4
MODEL = ModelId("toy")
GATEWAY = NodeId("gateway")


def layer(inputs: list[int]) -> int:
    return (31 * sum((index + 1) * value for index, value in enumerate(inputs)) + 7) % VOCABULARY


def expected(prompt: tuple[int, ...], count: int, window: int = 10**6) -> list[int]:
    """The text of the unsplit model, whose layers look at the last `window` tokens."""
    ids = list(prompt)
    while len(ids) < len(prompt) + count:
        values = list(ids)
        for _ in range(LAYERS):
            firsts = [max(0, at + 1 - window) for at in range(len(values))]
            values = [layer(values[first : at + 1]) for at, first in enumerate(firsts)]
        ids.append(values[-1])
    return ids[len(prompt) :]


@dataclass
class ToySampler:
    sampling: Sampling
    outputs: int

    def choose(self, values: list[int], draft: Sequence[int]) -> tuple[Sampled, ...]:
        """One token, and those of the draft that are right."""
        chosen: list[Sampled] = []
        for value, guess in zip(values, (*draft, None), strict=True):
            self.outputs += 1
            over = self.outputs >= self.sampling.max_tokens
            chosen.append(Sampled(value, "length" if over else ""))
            if over or value != guess:
                break
        return tuple(chosen)


@dataclass
class ToyNode:
    """One stage: its sessions, the rows that wait, and the cache of each of its layers."""

    id: NodeId
    layers: Slice
    sessions: StageSessions
    guess: Callable[[Wish], tuple[int, ...]] | None = None
    forwards: int = 0
    tokens: int = 0  # computed
    leaving: bool = False
    ready: deque = field(default_factory=deque)
    cache: dict = field(default_factory=dict)

    def step(self) -> list:
        """One forward over at most one row of each session, in order."""
        rows, seen = [], set()
        for row in list(self.ready):
            if row.session not in seen:
                seen.add(row.session)
                rows.append(row)
                self.ready.remove(row)
        self.forwards += 1
        self.sessions.begin(rows)
        if self.guess is None:
            return rows
        wishes = self.sessions.guesses.wishes(rows)
        drafts = {at: self.guess(wish) for at, wish in wishes.items()}
        return self.sessions.guesses.added(rows, drafts)

    def compute(self, rows: list) -> tuple[list, list]:
        hidden, sampled = [], []
        for row in rows:
            values = list(row.ids if row.wire is None else row.wire)
            self.tokens += row.count
            for number in row.layers or self.layers:
                values = [
                    self._layer(number, row, row.start + at, value)
                    for at, value in enumerate(values)
                ]
            hidden.append(memoryview(bytes(values)))
            ends = values[-1 - len(row.draft) :]
            sampled.append(row.sampler.choose(ends, row.draft) if row.sampler else ())
        return hidden, sampled

    def _layer(self, number: int, row, position: int, value: int) -> int:
        first = max(0, position + 1 - (self.sessions.config.window or position + 1))
        slots = [row.pages[at // PAGE] * PAGE + at % PAGE for at in range(first, position + 1)]
        assert min(slots) >= 0, "a page within the window is there"
        pool, page = self.sessions.pool, slots[-1] // PAGE
        assert pool._holders[page] == 1, "a session never writes into a page that it shares"
        assert page not in pool._names, "nor into one that others may find"
        self.cache[number, slots[-1]] = value
        return layer([self.cache[number, slot] for slot in slots])


@dataclass
class SmallMesh:
    seed: int
    slices: dict[str, Slice]
    pages: int = 40
    max_waiting: int = 8
    context_length: int = 512
    headroom: int = 4
    share_prefixes: bool = True
    gateway_share: float = 1.0
    window: int | None = None
    guess: Callable[[Wish], tuple[int, ...]] | None = None  # the first stages' drafter
    history_bytes: int = 1 << 20
    rewinds: bool = True
    keeps: bool = True  # the planner knows what it is to keep stations
    parts: bool = False  # stages run parts of their slices

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.nodes = {
            NodeId(name): self._node(NodeId(name), cut) for name, cut in self.slices.items()
        }
        self.links: dict[tuple[NodeId, NodeId], deque] = {}
        self.forwards: deque = deque()  # (node, rows) being computed
        self.generations: list[Generation] = []
        self.delivered: list[list[int]] = []
        self.finished: list[Finish | None] = []
        self.now = 0.0
        self.replays: list[tuple[NodeId, SessionId]] = []  # chunks that are under way
        self.replayed = 0  # tokens
        self.stalls = 0
        self.kinds: list[str] = []  # of the routes taken
        self.cut: set[frozenset[NodeId]] = set()  # pairs that cannot reach each other
        self.paused: set[NodeId] = set()
        self.matched: list[PrefixMatched] = []
        self.preempted: list[int] = []  # generations, as often as they were sent away
        self._sessions = 0
        self._gateways: list[NodeId] = []  # of each generation

    def _node(self, name: NodeId, cut: Slice) -> ToyNode:
        sessions = StageSessions(
            me=name,
            first=cut.start == 0,
            last=cut.stop == LAYERS,
            vocab_size=VOCABULARY,
            context_length=self.context_length,
            pool=PrefixPool(self.pages, PAGE),
            make_sampler=self.make_sampler,
            config=StageSessionsConfig(
                chunk_tokens=4,
                max_waiting=self.max_waiting,
                headroom_tokens=self.headroom,
                share_prefixes=self.share_prefixes,
                gateway_share=self.gateway_share,
                window=self.window,
                history_bytes=self.history_bytes,
                rewinds=self.rewinds,
            ),
            layers=cut,
        )
        return ToyNode(name, cut, sessions, self.guess)

    def make_sampler(self, sampling: Sampling, prompt: Sequence[int], output: Sequence[int]):
        return ToySampler(sampling, len(output))

    # ---- the client's side

    def ask(self, prompt: tuple[int, ...], max_tokens: int, gateway: NodeId = GATEWAY) -> int:
        return self.ask_for(prompt, Sampling(temperature=0, max_tokens=max_tokens), gateway)

    def ask_for(
        self, prompt: tuple[int, ...], sampling: Sampling, gateway: NodeId = GATEWAY
    ) -> int:
        generation = Generation(
            Request("toy", prompt, sampling),
            self._new_session,
            GenerationConfig(page_tokens=PAGE),
            born=len(self.generations),
        )
        self.generations.append(generation)
        self._gateways.append(gateway)
        self.delivered.append([])
        self.finished.append(None)
        self._gateway(len(self.generations) - 1, generation.begin())
        return len(self.generations) - 1

    def _new_session(self) -> SessionId:
        self._sessions += 1
        return SessionId(f"s{self._sessions}")

    def plan(self, wish: RouteWish) -> Plan:
        """Any chain of live stages around those that are kept, by chance."""
        kept = {stop.layers.start: stop for stop in wish.keep if self.keeps}
        starts = [*sorted(kept), LAYERS]
        stops, at = [], 0
        while at < LAYERS:
            if at in kept:
                stops.append(kept[at])
                at = kept[at].layers.stop
                continue
            busy = {stop.node for stop in (*kept.values(), *stops)}
            limit = next(start for start in starts if start > at)
            fits = [
                (n.id, part)
                for n in self.nodes.values()
                if n.id not in wish.avoid | busy and not n.leaving
                for part in self._parts(n.layers, at, limit)
            ]
            if not fits:
                raise NoRoute(f"nobody holds layer {at}")
            stops.append(Stop(*self.random.choice(fits)))
            at = stops[-1].layers.stop
        return Plan(MODEL, "f32", tuple(stops))

    def _parts(self, held: Slice, at: int, limit: int) -> list[Slice]:
        if self.parts:
            ends = range(at + 1, min(held.stop, limit) + 1) if held.start <= at else range(0)
            return [Slice(at, stop) for stop in ends]
        return [held] if held.start == at and held.stop <= limit else []

    def _gateway(self, index: int, instructions: list) -> None:
        for instruction in instructions:
            match instruction:
                case Tell(node, message, ids, digests):
                    self._send(self._gateways[index], node, (message, (ids, digests)))
                case FindRoute(wishes, needed):
                    self._find(index, wishes, needed)
                case Deliver(sampled):
                    self.delivered[index].append(sampled.token)
                case Finish():
                    assert self.finished[index] is None, "a generation ends once"
                    self.finished[index] = instruction

    def _find(self, index: int, wishes: Sequence[RouteWish], needed: bool) -> None:
        generation = self.generations[index]
        for wish in wishes:
            try:
                plan = self.plan(wish)
            except ShoalError as error:
                missing = error
                continue
            instructions = generation.route(plan)
            self.kinds.append(generation.kind)
            self._gateway(index, instructions)
            return
        if needed:
            self._gateway(index, generation.no_route(missing))

    # ---- the wire

    def _send(self, sender: NodeId, to: NodeId, item) -> None:
        reached = frozenset((sender, to)) not in self.cut
        if (to in self._gateways or to in self.nodes) and reached:
            self.links.setdefault((sender, to), deque()).append(item)

    def _do(self, node: ToyNode, instructions: list) -> None:  # noqa: C901 - one case each
        for instruction in instructions:
            match instruction:
                case Connect(session, to):
                    alive = to in self.nodes and frozenset((node.id, to)) not in self.cut
                    ready = (
                        node.sessions.connected(session, self.now)
                        if alive
                        else node.sessions.unreachable(session, "dead")
                    )
                    self._do(node, ready)
                case Send(to, message):
                    if isinstance(message, Preempted):
                        self._assert_for_an_older(node, message.session)
                    self._send(node.id, to, (message, ()))
                case Replay(session, to, message, hidden):
                    self.replayed += message.rows[0].count
                    self._send(node.id, to, (message, [memoryview(hidden)]))
                    self.replays.append((node.id, session))
                case Enqueue(row):
                    node.ready.append(row)
                case Drop(session):
                    node.ready = deque(row for row in node.ready if row.session != session)
                case Note(PrefixMatched() as matched):
                    self.matched.append(matched)
                case Note(SessionPreempted()):
                    pass  # counted where its gateway hears of it
                case Forward():
                    raise AssertionError("only finish() forwards")

    def _assert_for_an_older(self, node: ToyNode, session: SessionId) -> None:
        """The oldest session of a stage, and so the oldest of all, is never sent away. (Who is
        not to take from another gateway goes itself.)
        """
        (born,) = [each.born for each in self.generations if each.session == session] or [1 << 60]
        older = [each for each in node.sessions._sessions.values() if each.open.born < born]
        assert older or self.gateway_share < 1, "the oldest is never sent away"

    def kill(self, name: str) -> None:
        """The node is gone at once; what it had sent may still be under way, what was sent to it is
        lost.
        """
        gone = NodeId(name)
        self.nodes.pop(gone)
        self.forwards = deque(each for each in self.forwards if each[0] != gone)
        self.replays = [each for each in self.replays if each[0] != gone]
        self.links = {key: queue for key, queue in self.links.items() if gone not in key}
        for node in list(self.nodes.values()):
            self._do(node, node.sessions.node_lost(gone, "killed", self.now))
        for index, generation in enumerate(self.generations):
            self._gateway(index, generation.node_lost(gone, "killed"))

    def unlink(self, one: str, other: str) -> None:
        """Two stages cannot reach each other any more; everybody else reaches both."""
        pair = NodeId(one), NodeId(other)
        self.cut.add(frozenset(pair))
        for at, node in enumerate(pair):
            self.links.pop((node, pair[1 - at]), None)
        for at, node in enumerate(pair):
            if node in self.nodes:
                self._do(
                    self.nodes[node],
                    self.nodes[node].sessions.node_lost(pair[1 - at], "cut", self.now),
                )

    def pause(self, name: str) -> None:
        """It stands still, and everybody takes it for dead; it does not know yet."""
        gone = NodeId(name)
        self.paused.add(gone)
        for node in list(self.nodes.values()):
            if node.id != gone:
                self._do(node, node.sessions.node_lost(gone, "silent", self.now))
        for index, generation in enumerate(self.generations):
            self._gateway(index, generation.node_lost(gone, "silent"))

    def wake(self, name: str) -> None:
        """What it had sent and computed is late; then it finds that its links are gone."""
        self.paused.discard(NodeId(name))

    def find_links_gone(self, name: str) -> None:
        node = self.nodes[NodeId(name)]
        for other in sorted({*self.nodes, *self._gateways} - {node.id}):
            self._do(node, node.sessions.node_lost(other, "silent", self.now))

    def leave(self, name: str) -> None:
        """It asks the gateways to move its sessions, and takes no new ones."""
        node = self.nodes[NodeId(name)]
        node.leaving = True
        self._do(node, node.sessions.leave())

    def lose_gateway(self, gateway: NodeId) -> None:
        for node in self.nodes.values():
            self._do(node, node.sessions.node_lost(gateway, "killed", self.now))
        self.links = {key: queue for key, queue in self.links.items() if gateway not in key}
        for index, each in enumerate(self._gateways):
            if each == gateway:
                self.generations[index].cancel()
                self._gateways[index] = NodeId("nobody")

    def cancel(self, index: int) -> None:
        self._gateway(index, self.generations[index].cancel())

    # ---- time

    def turn(self) -> bool:
        """One thing happens, chosen by chance. False when nothing is left to happen."""
        still = self.paused
        moves = [("deliver", key) for key, queue in self.links.items() if queue]
        moves = [move for move in moves if not still & set(move[1])]
        moves += [
            ("step", node.id)
            for node in self.nodes.values()
            if node.ready and not self._busy(node.id) and node.id not in still
        ]
        moves += [("finish", at) for at, each in enumerate(self.forwards) if each[0] not in still]
        moves += [("replay", at) for at, each in enumerate(self.replays) if each[0] not in still]
        if not moves:
            return self._patience_ends()
        kind, what = self.random.choice(moves)
        self.now += 0.001
        if kind == "deliver":
            self._deliver(*what)
        elif kind == "step":
            node = self.nodes[what]
            self.forwards.append((what, node.step()))
        elif kind == "replay":
            name, session = self.replays.pop(what)
            node = self.nodes[name]
            self._do(node, node.sessions.replay_on(session, self.now))
        else:
            self._finish_forward(what)
        return True

    def _busy(self, name: NodeId) -> bool:
        return any(node == name for node, _ in self.forwards)

    def _patience_ends(self) -> bool:
        """Nobody has anything to do: those who wait give up, first who waits for pages, then
        gateways, then stages that nobody tells how to go on.
        """
        awake = [n for n in self.nodes.values() if n.id not in self.paused]
        waiting = [n for n in awake if n.sessions.next_deadline() is not None]
        if not any(n.sessions.waiting for n in awake) and self._stalled():
            return True
        for node in waiting:
            self.now = max(self.now, node.sessions.next_deadline() or 0.0)
            self._do(node, node.sessions.admit(self.now))
        return bool(waiting)

    def _stalled(self) -> bool:
        live = [at for at, finish in enumerate(self.finished) if finish is None]
        live = [at for at in live if self._gateways[at] not in self.paused | {NodeId("nobody")}]
        self.now += 10.0
        for at in live:
            self.stalls += 1
            self._gateway(at, self.generations[at].stalled())
        return bool(live)

    def _finish_forward(self, at: int) -> None:
        name, rows = self.forwards[at]
        del self.forwards[at]
        node = self.nodes[name]
        hidden, sampled = node.compute(rows)
        rest = []
        for instruction in node.sessions.finish(rows, sampled, self.now):
            if isinstance(instruction, Forward):
                parts = [hidden[i] for i in instruction.rows]
                if instruction.node is not None:
                    self._send(name, instruction.node, (instruction.message, parts))
                whole = memoryview(b"".join(parts))
                rest += node.sessions.keep(instruction.message, whole)
            else:
                rest.append(instruction)
        self._do(node, rest)

    def _deliver(self, sender: NodeId, to: NodeId) -> None:  # noqa: C901 - one case each
        message, body = self.links[sender, to].popleft()
        if to in self._gateways:
            self._to_gateway(sender, to, message)
        node = self.nodes.get(to)
        if node is None:
            return
        match message:
            case Open():
                self._do(node, node.sessions.open(message, body[0], sender, self.now, body[1]))
            case Resume():
                self._do(node, node.sessions.resume(message, body[0], sender, self.now))
            case Go():
                self._do(node, node.sessions.go(message, sender, self.now))
            case Close(session):
                self._do(node, node.sessions.close(session, sender, self.now, body[1]))
            case Step(rows):
                for entry, values in zip(rows, body, strict=True):
                    self._do(node, node.sessions.receive(entry, values, sender, self.now))
            case Tokens(entries):
                for entry in entries:
                    self._do(node, node.sessions.token(entry, sender, self.now))

    def _to_gateway(self, sender: NodeId, to: NodeId, message) -> None:  # noqa: C901 - the same
        for index, generation in enumerate(self.generations):
            if self._gateways[index] != to:
                continue
            match message:
                case Opened():
                    self._gateway(index, generation.opened(message, sender))
                case Refused():
                    self._gateway(index, generation.refused(message, sender))
                case Preempted(session):
                    if session == generation.session:
                        self.preempted.append(index)
                    self._gateway(index, generation.preempted(message, sender))
                case Lost():
                    self._gateway(index, generation.stage_lost(message, sender))
                case Leaving():
                    self._gateway(index, generation.leaving(message, sender))
                case Tokens(entries):
                    for entry in entries:
                        self._gateway(index, generation.token(entry, sender))

    # ---- what must always hold

    def assert_pages_are_counted_right(self) -> None:
        for node in self.nodes.values():
            held: Counter[int] = Counter()
            for session in node.sessions._sessions.values():
                held.update(page for page in session.pages if page >= 0)
            assert held == node.sessions.pool._holders
            assert not held.keys() & node.sessions.pool._idle.keys()
            assert not held.keys() & set(node.sessions.pool._pool._free)
