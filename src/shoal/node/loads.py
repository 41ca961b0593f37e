"""How busy stages are, by whoever said it last: their announcement, a stage that opened a session
for us, or we ourselves, who have just sent it one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

from ..bus import StageOffer
from ..pipeline.messages import Load
from ..pipeline.stage_key import WHOLE
from ..placement import Held
from ..units import ModelId, NodeId

HIGH_WATER = 0.9  # of a stage's KV room: running sessions grow into the rest
LOAD_S = 10.0  # what a stage said is taken for true so long, unless it announces something new
PLANNED_S = 5.0  # by then a session that we planned is counted by the stage, or never came
MAX_PLANNED = 256  # more are not counted: who is sent away at once would pile up

Key = tuple[NodeId, ModelId]


class Loads:
    """`clock` gives seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._told: dict[Key, tuple[Load, float, StageOffer | None]] = {}
        self._planned: dict[Key, deque[tuple[float, int]]] = {}  # when, and for how many tokens

    def told(self, node: NodeId, model: ModelId, load: Load) -> None:
        """A stage has opened one of the sessions that we planned, and says how busy it is."""
        self._told[node, model] = load, self._clock(), None
        if planned := self._planned.get((node, model)):
            planned.popleft()

    def planned(self, nodes: Iterable[NodeId], model: ModelId, need_tokens: int) -> None:
        """A session is on its way to these."""
        now = self._clock()
        for node in nodes:
            self._planned.setdefault((node, model), deque(maxlen=MAX_PLANNED)).append(
                (now, need_tokens)
            )

    def held(self, node: NodeId, offer: StageOffer) -> Held:
        """The stage as it is now, as far as we know."""
        coming = self._coming((node, offer.model))
        return as_held(node, offer, self._load(node, offer), coming)

    def _load(self, node: NodeId, offer: StageOffer) -> Load | None:
        key = (node, offer.model)
        if key in self._told:
            load, at, before = self._told[key]
            if before in (None, offer) and self._clock() - at <= LOAD_S:
                self._told[key] = load, at, offer
                return load
            del self._told[key]
        return None

    def _coming(self, key: Key) -> list[int]:
        planned = self._planned.get(key)
        if planned is None:
            return []
        while planned and self._clock() - planned[0][0] > PLANNED_S:
            planned.popleft()
        if not planned:
            del self._planned[key]
        return [need for _, need in planned]


def as_held(
    node: NodeId, offer: StageOffer, load: Load | None = None, coming: Sequence[int] = ()
) -> Held:
    """A stage in placement's terms: as announced, or as busy as `load` says, with sessions for so
    many tokens each on their way to it.
    """
    load = load or Load(offer.sessions, offer.queue, offer.free_tokens)
    sessions = load.sessions + len(coming)
    reserve = round(offer.total_tokens * (1 - HIGH_WATER)) if sessions else 0
    return Held(
        node=node,
        layers=offer.layers,
        state=offer.state,
        compute=offer.compute,
        speed=offer.speed,
        sessions=sessions,
        queue=load.queue,
        free_tokens=max(load.free_tokens - sum(coming) - reserve, 0),
        whole=offer.compute in WHOLE,
    )
