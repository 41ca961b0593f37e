"""The generations that entered the mesh at this node: carries out what `generation.py` decides."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Self

from ..engine.request import Sampled
from ..errors import LinkClosed, LocalError, Overloaded, ShoalError
from ..events import Emit, FirstToken, Recovered, RequestDone, RequestStarted, RouteTaken
from ..transport import Links
from ..units import ModelId, NodeId, SessionId
from .eras import Eras
from .generation import Generation
from .messages import (
    Close,
    Leaving,
    Load,
    Lost,
    Open,
    Opened,
    Preempted,
    Refused,
    TokenEntry,
    pack_ids,
    to_frame,
)
from .plans import (
    Deliver,
    FindRoute,
    Finish,
    GenerationConfig,
    Instruction,
    Plan,
    Planner,
    Request,
    Tell,
    Wish,
)
from .reunion import Reunion

OnLoad = Callable[[NodeId, ModelId, Load], None]


class Stream:
    """The tokens of one generation, as they come. Iterate it once; `aclose` cancels and frees
    everything everywhere.
    """

    def __init__(self, gateway: Gateway, generation: Generation) -> None:
        self.id = gateway.new_id()  # stays the same over all routes that are tried
        self.generation = generation
        self._gateway = gateway
        self._arrived: asyncio.Queue[Sampled | Finish] = asyncio.Queue()  # bounded by max_tokens
        self.started = gateway.clock()
        self.progress = self.started
        self.timer: asyncio.TimerHandle | None = None
        self.reunion = Reunion(gateway.config.reunion)
        self.live: SessionId | None = None  # the session that the gateway listens to
        self.settled = asyncio.Event()  # every stage is open, or the generation is over
        self.error: ShoalError | None = None
        self.first_at: float | None = None  # when the first token came
        self.spoke_at = self.started  # when the newest one did
        self.leavers: set[NodeId] = set()  # stages that asked this session to go on without them
        self.attempt = 0  # the route that we told of
        self.mending = False  # no token has come since a route broke

    @property
    def plan(self) -> Plan | None:
        """The route in use."""
        return self.generation.plan

    async def opened(self) -> Self:
        """Back once every stage is open. Raises NoRoute, Overloaded, PromptTooLong or StageLost
        otherwise.
        """
        await self.settled.wait()
        if self.error is not None and not self.generation.output:
            raise self.error
        return self

    def put(self, item: Sampled | Finish) -> None:
        self._arrived.put_nowait(item)

    async def __aiter__(self) -> AsyncIterator[Sampled]:
        """Yields each token once, in order. Raises what `opened` raises, or StageLost."""
        while True:
            item = await self._arrived.get()
            if isinstance(item, Finish):
                if item.error is not None:
                    raise item.error
                return
            yield item

    async def aclose(self) -> None:
        self._gateway.cancel(self)


def _is_of(plan: Plan | None, node: NodeId) -> bool:
    return plan is not None and any(stop.node == node for stop in plan.stops)


class Gateway:
    """Keeps each generation going until it has ended in a whole answer or in one error."""

    def __init__(
        self,
        links: Links,
        planner: Planner,
        *,
        emit: Emit,
        clock: Callable[[], float],
        config: GenerationConfig | None = None,
        wall_clock: Callable[[], float] = time.time,
        draw: Callable[[int], bytes] = secrets.token_bytes,
        on_load: OnLoad = lambda node, model, load: None,
    ) -> None:
        self.clock = clock
        self._on_load = on_load
        self._draw = draw
        self._links, self._planner, self._emit = links, planner, emit
        self.config = config or GenerationConfig()
        self._wall_clock = wall_clock
        self._newest = 0  # when the newest request was born
        self._secret = draw(16)
        self._eras = Eras()
        self._streams: dict[SessionId, Stream] = {}  # by the id of the live session
        self._all: dict[SessionId, Stream] = {}  # by the stream's own id
        self.idle = asyncio.Event()  # no stream is open
        self.idle.set()

    def __len__(self) -> int:
        return len(self._all)

    def new_id(self) -> SessionId:
        return SessionId(self._draw(8).hex())

    def generate(self, request: Request) -> Stream:
        """Start at once; errors of the start are raised by the first iteration."""
        generation = Generation(
            request,
            self.new_id,
            self.config,
            born=self._next_birth(),
            secret=self._secret,
            era=self._eras.of,
        )
        stream = Stream(self, generation)
        self._all[stream.id] = stream
        self.idle.clear()
        self._emit(RequestStarted(stream.id, request.model_name, len(request.prompt_ids)))
        self._arm(stream, self.config.answer_timeout_s)
        self._do(stream, stream.generation.begin())
        return stream

    def _next_birth(self) -> int:
        """Microseconds since 1970, no two alike: stages rank sessions of all gateways by it."""
        self._newest = max(self._newest + 1, int(self._wall_clock() * 1e6))
        return self._newest

    def cancel(self, stream: Stream) -> None:
        self._do(stream, stream.generation.cancel())

    # ---- messages in

    def opened(self, message: Opened, sender: NodeId) -> None:
        stream = self._streams.get(message.session)
        if stream is None:
            self._unwanted(message.session, sender)
            return
        if message.load is not None and stream.plan and _is_of(stream.plan, sender):
            self._on_load(sender, stream.plan.model, message.load)
        self._answered(stream, partial(stream.generation.opened, message, sender))

    def _unwanted(self, session: SessionId, sender: NodeId) -> None:
        """Its Open reached the stage late: the Close was not sent while there was no link."""
        with suppress(LinkClosed, Overloaded):
            self._links.send(sender, to_frame(Close(session)))

    def refused(self, message: Refused, sender: NodeId) -> None:
        if stream := self._streams.get(message.session):
            self._do(stream, stream.generation.refused(message, sender))

    def token(self, entry: TokenEntry, sender: NodeId) -> None:
        if stream := self._streams.get(entry.session):
            self._answered(stream, partial(stream.generation.token, entry, sender))

    def _answered(self, stream: Stream, step: Callable[[], list[Instruction]]) -> None:
        """What does not get the generation on does not keep its timer from ending it either."""
        before = stream.generation.progress
        instructions = step()
        if stream.generation.progress != before:
            stream.progress = self.clock()
        self._do(stream, instructions)

    def preempted(self, message: Preempted, sender: NodeId) -> None:
        if stream := self._streams.get(message.session):
            self._do(stream, stream.generation.preempted(message, sender))

    def stage_lost(self, message: Lost, sender: NodeId) -> None:
        if stream := self._streams.get(message.session):
            self._do(stream, stream.generation.stage_lost(message, sender))

    def leaving(self, message: Leaving, sender: NodeId) -> None:
        """A look for a route takes time: each stage can have one in a session."""
        stream = self._streams.get(message.session)
        if stream is None or sender in stream.leavers or not _is_of(stream.plan, sender):
            return
        if stream.generation.state == "running":
            stream.leavers.add(sender)
        self._do(stream, stream.generation.leaving(message, sender))

    def node_lost(self, node: NodeId, why: str) -> None:
        self._eras.lost(node)
        for stream in list(self._all.values()):
            self._do(stream, stream.generation.node_lost(node, why))

    # ---- instructions out

    def _do(self, stream: Stream, instructions: list[Instruction]) -> None:
        self._follow(stream)
        for instruction in instructions:
            match instruction:
                case Tell():
                    self._tell(stream, instruction)
                case FindRoute(wishes, needed):
                    self._find_route(stream, wishes, needed)
                case Deliver(sampled):
                    self._deliver(stream, sampled)
                case Finish():
                    self._finish(stream, instruction)
        if stream.generation.state in ("running", "over"):
            stream.settled.set()

    def _tell(self, stream: Stream, tell: Tell) -> None:
        """A node without a link is dialled for an Open; if that fails, the links tell us."""
        if not isinstance(tell.message, Open) and not self._links.is_connected(tell.node):
            return
        body = b"".join(tell.digests) + pack_ids(tell.ids)
        try:
            self._links.send(tell.node, to_frame(tell.message, body))
        except (LinkClosed, Overloaded) as error:
            self._later(stream, tell.node, error)

    def _later(self, stream: Stream, node: NodeId, error: ShoalError) -> None:
        """Report the loss after the instructions at hand are done, never in the middle of them."""
        loop = asyncio.get_running_loop()
        loop.call_soon(lambda: self._do(stream, stream.generation.node_lost(node, error.message)))

    def _follow(self, stream: Stream) -> None:
        """A route is tried under an id of its own."""
        generation, now = stream.generation, self.clock()
        if generation.session != stream.live and generation.state != "over":
            self._listen(stream, generation.session)
        if generation.attempt == stream.attempt or generation.plan is None:
            return
        stream.attempt = generation.attempt
        stream.reunion.whole()
        stream.progress = now  # each route has the whole patience
        if generation.kind in ("recomputed", "replayed", "handed over") and not stream.mending:
            stream.mending = True
            stream.spoke_at = stream.spoke_at if generation.output else now
        route = tuple((stop.node, stop.layers) for stop in generation.plan.stops)
        self._emit(RouteTaken(stream.id, route, generation.attempt, generation.kind))

    def _deliver(self, stream: Stream, sampled: Sampled) -> None:
        now, generation = self.clock(), stream.generation
        if stream.first_at is None:
            stream.first_at = now
            self._emit(FirstToken(stream.id, generation.request.model_name, now - stream.started))
        if stream.mending:
            stream.mending = False
            gap = now - stream.spoke_at
            self._emit(Recovered(stream.id, generation.kind, gap, generation.replayed))
        stream.spoke_at = now
        stream.put(sampled)

    def _find_route(self, stream: Stream, wishes: Sequence[Wish], needed: bool) -> None:
        """The first of them that can be had."""
        generation = stream.generation
        plan: Plan | None = None
        missing = LocalError("no route")
        for wish in wishes:
            try:
                plan = self._planner(wish)
                break
            except LocalError as error:
                missing = error
        if plan is not None:
            self._do(stream, generation.route(plan))
        elif needed and not self._waits(stream, missing):
            self._do(stream, generation.no_route(missing))

    def _waits(self, stream: Stream, missing: LocalError) -> bool:
        """A route that broke may be whole again, or another node may take the place of who is gone:
        only then is what was lost given up.
        """
        if not stream.generation.lost:
            return False
        wait_s = stream.reunion.next_look_s(missing.relief, self.clock())
        if wait_s is not None:
            asyncio.get_running_loop().call_later(wait_s, self._look_again, stream)
        return wait_s is not None

    def _look_again(self, stream: Stream) -> None:
        """Who was lost and can be reached again is given another chance; who misbehaved is not."""
        generation = stream.generation
        if stream.id in self._all and generation.state == "routing":
            back = frozenset(node for node in generation.lost if self._links.is_connected(node))
            self._do(stream, generation.look_again(back))

    def _listen(self, stream: Stream, session: SessionId | None) -> None:
        if stream.live is not None:
            self._streams.pop(stream.live, None)
        stream.live = session
        stream.leavers.clear()
        if session is not None:
            self._streams[session] = stream

    def _finish(self, stream: Stream, finish: Finish) -> None:
        stream.error = finish.error
        stream.put(finish)
        self._all.pop(stream.id, None)
        if not self._all:
            self.idle.set()
        self._listen(stream, None)
        if stream.timer is not None:
            stream.timer.cancel()
        request, output = stream.generation.request, stream.generation.output
        took = self.clock() - stream.started
        self._emit(RequestDone(stream.id, request.model_name, finish.reason, len(output), took))

    # ---- nothing hangs

    def _patience(self, stream: Stream) -> float:
        """A stream that is silent for many times its usual pace has stalled; a prompt takes its
        time.
        """
        config, generation = self.config, stream.generation
        if generation.state == "opening":
            asked = config.answer_timeout_s
            if generation.mending:  # they answer when their forward has ended
                return 2 * asked
            return asked + (config.queue_patience_s if generation.patient else 0.0)
        if stream.first_at is None or stream.mending:
            known = len(generation.request.prompt_ids) + len(generation.output)
            wanted = config.stall_s + config.prompt_patience_s * known
        else:
            pace = (stream.spoke_at - stream.first_at) / len(generation.output)
            wanted = max(config.stall_s, config.stall_paces * pace)
        return min(wanted, config.stall_timeout_s)

    def _arm(self, stream: Stream, delay_s: float) -> None:
        loop = asyncio.get_running_loop()
        stream.timer = loop.call_later(max(delay_s, 0.01), self._check, stream)

    def _check(self, stream: Stream) -> None:
        """One sleeping timer a stream, set anew only when it fires: a token costs nothing here."""
        if stream.id not in self._all:
            return
        left = stream.progress + self._patience(stream) - self.clock()
        if left <= 0:
            stream.progress = self.clock()
            self._do(stream, stream.generation.stalled())
            left = self._patience(stream)
        if stream.id in self._all:
            self._arm(stream, left)
