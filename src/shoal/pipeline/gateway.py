"""The generations that entered the mesh at this node: carries out what `generation.py` decides."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Self

from ..engine.request import Sampled
from ..errors import LinkClosed, LocalError, Overloaded, ShoalError
from ..events import Emit, FirstToken, RequestDone, RequestStarted, RouteTaken
from ..transport import Links
from ..units import NodeId, SessionId
from .generation import (
    Deliver,
    FindRoute,
    Finish,
    Generation,
    GenerationConfig,
    Instruction,
    Plan,
    Request,
    Tell,
)
from .messages import Lost, Open, Opened, Preempted, Refused, TokenEntry, pack_ids, to_frame

Planner = Callable[
    [str, int, frozenset[NodeId]], Plan
]  # (model name, tokens needed, nodes to avoid) or NoRoute


LOOKS = 8  # for a route that may be whole again


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
        self.looks = 0  # for a route, since the last one broke
        self.live: SessionId | None = None  # the session that the gateway listens to
        self.settled = asyncio.Event()  # every stage is open, or the generation is over
        self.error: ShoalError | None = None
        self.speaks = False  # a token has come

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
    ) -> None:
        self.clock = clock
        self._draw = draw
        self._links, self._planner, self._emit = links, planner, emit
        self._config = config or GenerationConfig()
        self._wall_clock = wall_clock
        self._newest = 0  # when the newest request was born
        self._secret = draw(16)
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
            request, self.new_id, self._config, born=self._next_birth(), secret=self._secret
        )
        stream = Stream(self, generation)
        self._all[stream.id] = stream
        self.idle.clear()
        self._emit(RequestStarted(stream.id, request.model_name, len(request.prompt_ids)))
        self._arm(stream, self._config.answer_timeout_s)
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
        if stream := self._streams.get(message.session):
            self._answered(stream, partial(stream.generation.opened, message, sender))

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

    def node_lost(self, node: NodeId, why: str) -> None:
        for stream in list(self._all.values()):
            self._do(stream, stream.generation.node_lost(node, why))

    # ---- instructions out

    def _do(self, stream: Stream, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Tell():
                    self._tell(stream, instruction)
                case FindRoute(avoid):
                    self._find_route(stream, avoid)
                case Deliver(sampled):
                    if not stream.speaks:
                        stream.speaks = True
                        name = stream.generation.request.model_name
                        self._emit(FirstToken(stream.id, name, self.clock() - stream.started))
                    stream.put(sampled)
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

    def _find_route(self, stream: Stream, avoid: frozenset[NodeId]) -> None:
        generation = stream.generation
        try:
            plan = self._planner(generation.request.model_name, generation.needed_tokens, avoid)
        except LocalError as error:
            if not self._waits_for_a_link(stream):
                self._do(stream, generation.no_route(error))
            return
        stream.looks = 0
        stream.progress = self.clock()  # each route has the whole patience
        instructions = generation.route(plan)
        self._listen(stream, generation.session)
        route = tuple((stop.node, stop.layers) for stop in plan.stops)
        self._emit(RouteTaken(stream.id, route, generation.attempt))
        self._do(stream, instructions)

    def _waits_for_a_link(self, stream: Stream) -> bool:
        """A route that broke may be whole again in a moment: a link that fell silent because a
        machine was busy is dialled anew. Only then is what was lost given up.
        """
        if not stream.generation.lost or stream.looks >= LOOKS:
            return False
        stream.looks += 1
        loop = asyncio.get_running_loop()
        loop.call_later(self._config.reunion_s / LOOKS, self._look_again, stream)
        return True

    def _look_again(self, stream: Stream) -> None:
        """Who was lost and can be reached again is given another chance; who misbehaved is not."""
        generation = stream.generation
        if stream.id in self._all and generation.state == "routing":
            back = frozenset(node for node in generation.lost if self._links.is_connected(node))
            self._find_route(stream, generation.avoid - back)

    def _listen(self, stream: Stream, session: SessionId | None) -> None:
        if stream.live is not None:
            self._streams.pop(stream.live, None)
        stream.live = session
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
        config, generation = self._config, stream.generation
        if generation.state != "opening":
            return config.stall_timeout_s
        return config.answer_timeout_s + (config.queue_patience_s if generation.patient else 0.0)

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
