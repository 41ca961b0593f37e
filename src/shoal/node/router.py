"""Joins what the mesh announces with what this machine can open: which models there are, and by
which route.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator

from msgspec.structs import replace

from ..bus import StageOffer
from ..errors import ModelNotFound, NoRoute, ShoalError
from ..models.catalogue import Catalogue
from ..models.checkpoint import Checkpoint
from ..models.text import Tokenizer
from ..pipeline import ANY_TOKEN, Plan, Stop
from ..placement import Held, cheapest_route
from ..units import NodeId, Slice

HOP_S = 0.0005  # one way, between two nodes whose distance nobody has measured
WHOLE = ("gguf", "served")  # computed by others' engines, which run all of a slice
MAX_MODELS = 64  # that we speak of: strangers may announce names without end
MAX_STAGES = 256  # that a route is chosen from: the search grows with the square of their number


class Router:
    """`offers` yields every stage that is announced, our own included; `doubtful` are nodes we
    cannot reach now.
    """

    def __init__(
        self,
        me: NodeId,
        catalogue: Catalogue,
        offers: Callable[[], Iterator[tuple[NodeId, StageOffer]]],
        doubtful: Callable[[], frozenset[NodeId]],
    ) -> None:
        self._me, self._catalogue = me, catalogue
        self._offers, self._doubtful = offers, doubtful

    def model_names(self) -> list[str]:
        """Models that somebody serves, without impostors of those we have the files of."""
        pairs = {(node, offer.model_name) for node, offer in self._offers()}
        ours = [name for node, name in pairs if node == self._me]
        common = [name for name, _ in Counter(name for _, name in pairs).most_common(MAX_MODELS)]
        return sorted(name for name in {*ours, *common} if self._of(name))

    def checkpoint(self, name: str) -> Checkpoint | None:
        return self._catalogue.get(name)

    def tokenizer(self, name: str) -> Tokenizer | None:
        checkpoint = self._catalogue.get(name)
        if checkpoint is None:
            return None
        try:
            return self._catalogue.tokenizer(checkpoint)
        except ShoalError:  # layers can be served without one, text cannot
            return None

    def best_offer(self, name: str) -> StageOffer:
        """Any offer of that model, ours first; where we have the files, only of the very same
        model, and we know better how long its context is.
        """
        offers = [offer for _, offer in self._of(name)]
        checkpoint = self._catalogue.get(name)
        if not offers:
            raise ModelNotFound(
                f"nobody in this mesh serves {name!r}", hint=f"shoal up --model {name}"
            )
        if checkpoint is None:
            return offers[0]
        return replace(offers[0], context_length=checkpoint.context_length)

    def is_ready(self, name: str) -> bool:
        try:
            self.plan(name, 1, frozenset())
        except NoRoute:
            return False
        return True

    def plan(self, name: str, need_tokens: int, avoid: frozenset[NodeId]) -> Plan:
        """The cheapest route around `avoid`. Raises NoRoute naming the layers that nobody holds."""
        first = self.best_offer(name)
        avoid |= self._doubtful()
        held = [
            Held(
                node=node,
                layers=offer.layers,
                state=offer.state,
                speed=offer.speed,
                sessions=offer.sessions,
                queue=offer.queue,
                free_tokens=offer.free_tokens,
                compute=offer.compute,
                whole=offer.compute in WHOLE,
            )
            for node, offer in self._of(name)
            if node not in avoid
        ]
        route = cheapest_route(
            first.total_layers,
            few_of_each(held, need_tokens),
            latency=lambda a, b: 0.0 if a == b else HOP_S,
            gateway=self._me,
            need_tokens=need_tokens,
            model=name,
        )
        stops = tuple(Stop(hop.node, hop.layers) for hop in route.stages)
        checkpoint = self._catalogue.get(name)
        vocab_size = checkpoint.vocab_size if checkpoint else ANY_TOKEN
        return Plan(first.model, route.compute, stops, vocab_size)

    def _of(self, name: str) -> list[tuple[NodeId, StageOffer]]:
        """The offers of one model. Two checkpoints may share a name: the gateway's tokenizer
        decides which is meant, and without one the number of nodes.
        """
        by_node = {node: offer for node, offer in self._offers() if offer.model_name == name}
        offers = list(by_node.items())  # one slice of a model a node: more would be a lie
        if checkpoint := self._catalogue.get(name):
            wanted = checkpoint.model_id, checkpoint.layers
        elif offers:
            kinds = Counter((offer.model, offer.total_layers) for _, offer in offers)
            wanted = kinds.most_common(1)[0][0]
        else:
            return []
        return [(n, offer) for n, offer in offers if (offer.model, offer.total_layers) == wanted]


def few_of_each(held: Collection[Held], need_tokens: int) -> list[Held]:
    """At most MAX_STAGES of them: the best of every slice, then the second best, and so on."""
    places: defaultdict[tuple[str, Slice], int] = defaultdict(int)
    ranked: list[tuple[int, Held]] = []
    for stage in sorted(held, key=lambda one: (one.free_tokens < need_tokens, one.step_seconds)):
        ranked.append((places[stage.compute, stage.layers], stage))
        places[stage.compute, stage.layers] += stage.state == "serving"
    return [stage for _, stage in sorted(ranked, key=lambda pair: pair[0])[:MAX_STAGES]]
