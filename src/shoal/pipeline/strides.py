"""How a route is opened, in two strides, so that the first stage never computes for a stage that is
not ready: first every stage but the first, then the first, whose Open carries the prompt and so
starts the work. When pages are short somewhere, the session queues: the stages are then opened one
after the other in the order of their layers (the first one last), an order that all gateways share,
so that two sessions can never wait for each other in a circle.

Stages keep pages of earlier sessions. The Opens name the prompt's pages by digests, each stage says
how many of them it has, and the first one, told the least of these numbers, begins there. A digest
is chained to the route: what a bad stage put into others' pages is never met on a route without it,
nor on one with it once our link to it was lost (its `era` is over), as when its process began anew.
"""

from __future__ import annotations

from dataclasses import dataclass

from .attempt import Attempt
from .messages import Open
from .plans import Instruction, Stop, Tell


@dataclass
class Opening(Attempt):
    """From a route to the moment when all of its stages are there."""

    def _open_anew(self) -> list[Instruction]:
        """The Opens go out in one stride, or one by one when the last try found pages short."""
        plan = self._plan()
        if self.kind in ("replayed", "handed over"):
            self.kind = "recomputed"
        self._open, self._asked, self._caches, self._kept = [], {}, None, frozenset()
        self._to_open = [*plan.stops[1:], plan.stops[0]]
        self._root = self._root_of(plan)
        self._digests = self._chain([])
        self._prefix = len(self._digests) * self.config.page_tokens
        if self._preemptions > 1:  # perhaps what was shared could not be replaced: share nothing
            self._prefix = 0
        return self._ask_next()

    def _ask_next(self) -> list[Instruction]:
        last_stride = len(self._to_open) == 1
        now = self._to_open[:1] if self.patient or last_stride else self._to_open[:-1]
        self._to_open = self._to_open[len(now) :]
        self._asked = {stop.node: stop for stop in now}
        return [self._tell_open(stop) for stop in now]

    def _tell_open(self, stop: Stop) -> Tell:
        plan, sampling, prompt = self._plan(), self.request.sampling, self.request.prompt_ids
        at = plan.stops.index(stop)
        last = at == len(plan.stops) - 1
        message = Open(
            session=self._session(),
            model=plan.model,
            compute=plan.compute,
            layers=stop.layers,
            previous=plan.stops[at - 1].node,
            next=plan.stops[(at + 1) % len(plan.stops)].node,
            known_tokens=len(prompt) + len(self.output),
            reserve_tokens=self.needed_tokens,
            output_tokens=len(self.output),
            sampling=sampling if last else None,
            patience_s=self._queue_patience_s,
            born=self.born,
            page_tokens=self.config.page_tokens,
            digests=len(self._digests),
            prefix_tokens=self._prefix,
            hold=self._caches is not None,
        )
        return Tell(stop.node, message, self._ids_for(at), tuple(self._digests))

    def _ids_for(self, at: int) -> tuple[int, ...]:
        """All to the first stage; to the last one what its sampler has to know."""
        last = at == len(self._plan().stops) - 1
        if at == 0 or (last and self.request.sampling.repetition_penalty != 1.0):
            return self._known()
        return tuple(self.output) if last else ()

    @property
    def _queue_patience_s(self) -> float:
        """Who keeps others waiting does not queue."""
        return self.config.queue_patience_s if self.patient and self._caches is None else 0.0

    def _started(self) -> None:
        self._open += self._asked.values()
        self._asked, self._caches = {}, None
        self.state = "running"
