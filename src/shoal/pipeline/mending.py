"""How a route is mended when a stage is lost: the others keep the session for a moment, and only
what is missing is planned anew. All stages of the mended route are told at once, the old ones to
drop what waits and to say what they have (Resume), the new ones to come in (Open, held); then each
one what to send again (Go), as `recovery.py` decides. Where nobody goes on, or somebody refuses,
another route is opened with the token ids so far.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..units import NodeId, SessionId
from .messages import Go, Opened, Resume
from .plans import Instruction, Plan, Stop, Tell
from .recovery import Cache, restarts
from .strides import Opening


@dataclass
class Mending(Opening):
    """From a broken route to one that runs again."""

    def _broken(
        self, avoid: frozenset[NodeId], why: str, gone: frozenset[NodeId] = frozenset()
    ) -> list[Instruction]:
        """Mend the route where some of its stages have been at work, and go on with these."""
        waiting = self.state == "routing"  # we look for a route now and then
        staying = [stop for stop in self._holders() if stop.node not in avoid | gone]
        if waiting and not staying:
            closing = self._abandon()
            self.avoid |= avoid
            return closing
        if not staying or not self.config.replay or self._failures + 1 >= self.config.max_attempts:
            return self._again(avoid, why)
        closing = self._close(
            stop for stop in (*self._open, *self._asked.values()) if stop not in staying
        )
        self._blame = f"{', '.join(sorted(avoid))}: {why}"
        self._open, self._asked, self._to_open = staying, {}, []
        self.avoid |= avoid
        if waiting:
            return closing
        self.state, self._next_kind, self._caches = "routing", "recomputed", None
        self._failures += 1
        return [*closing, self._find()]

    def _holders(self) -> list[Stop]:
        """The stages that have something to go on from, in order."""
        opening = self.state == "opening"
        if opening and self._caches is None:
            return []
        there = {stop.node for stop in self._open} | (self._kept if opening else frozenset())
        return [stop for stop in self._plan().stops if stop.node in there]

    def _staying(self, plan: Plan) -> list[Stop]:
        old = self.plan
        if old is None or (old.model, old.compute) != (plan.model, plan.compute):
            return []
        return [stop for stop in self._open if stop in plan.stops]

    def _mend(self, before: SessionId) -> list[Instruction]:
        """Everybody is asked at once; nothing begins before all have answered."""
        if self.kind in ("new", "recomputed"):
            self.kind = "replayed"
        self._kept = frozenset(stop.node for stop in self._open)
        self._open, self._to_open, self._caches = [], [], {}
        self._asked = {stop.node: stop for stop in self._plan().stops}
        return [
            self._tell_resume(stop, before) if node in self._kept else self._tell_open(stop)
            for node, stop in self._asked.items()
        ]

    def _tell_resume(self, stop: Stop, before: SessionId) -> Tell:
        stops = self._plan().stops
        at = stops.index(stop)
        message = Resume(
            session=before,
            renamed=self._session(),
            known_tokens=len(self._known()),
            output_tokens=len(self.output),
            previous=stops[at - 1].node,
            next=stops[(at + 1) % len(stops)].node,
        )
        return Tell(stop.node, message, self._ids_for(at))

    def _answered(self, message: Opened, sender: NodeId) -> list[Instruction]:
        """A stage of a route being mended is there."""
        tokens = message.prefix_tokens
        if tokens >= len(self._known()) or (tokens and sender not in self._kept):
            return self._broken(frozenset({sender}), "it has what nobody gave it")
        assert self._caches is not None  # noqa: S101 - who calls has looked
        self._caches[sender] = Cache(tokens, min(message.kept_from, tokens))
        return [] if self._asked else self._go()

    def _go(self) -> list[Instruction]:
        """All stages of the mended route are there: the head, which begins, is told last."""
        stops, caches = self._plan().stops, self._caches or {}
        told = restarts([caches[stop.node] for stop in stops])
        self.replayed = sum(each.replayed for each in told)
        total = sum(caches[stop.node].tokens for stop in stops)
        self._stalls = self._stalls if total <= self._had else 0  # it was merely slow
        self._had = total
        self._started()
        goes: list[Instruction] = [
            Tell(stop.node, Go(self._session(), each.send_from, each.redo))
            for stop, each in zip(stops, told, strict=True)
        ]
        return goes[::-1]
