"""Joins what the mesh announces with what this machine can open: which models there are, and by
which route.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..bus import StageOffer
from ..errors import ModelNotFound, NoRoute
from ..models.catalogue import Catalogue
from ..models.checkpoint import Checkpoint
from ..models.text import Tokenizer
from ..pipeline import Plan, Stop
from ..placement import Held, cheapest_route
from ..units import NodeId, Seconds

HOP_S = 0.0005  # one way, between two nodes whose distance nobody has measured


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
        names = {offer.model_name for _, offer in self._offers()}
        return sorted(name for name in names if self._of(name))

    def checkpoint(self, name: str) -> Checkpoint | None:
        return self._catalogue.known(name)

    def tokenizer(self, name: str) -> Tokenizer | None:
        checkpoint = self._catalogue.known(name)
        return self._catalogue.tokenizer(checkpoint) if checkpoint else None

    def best_offer(self, name: str) -> StageOffer:
        """Any offer of that model, ours first; where we have the files, only of the very same
        model.
        """
        offers = [offer for _, offer in self._of(name)]
        if not offers:
            raise ModelNotFound(
                f"nobody in this mesh serves {name!r}", hint=f"shoal up --model {name}"
            )
        return offers[0]

    def is_ready(self, name: str) -> bool:
        try:
            self.plan(name, 1, frozenset())
        except NoRoute:
            return False
        return True

    def plan(self, name: str, need_tokens: int, avoid: frozenset[NodeId]) -> Plan:
        """The cheapest route around `avoid`. Raises NoRoute naming the layers that nobody holds."""
        first = self.best_offer(name)
        held = [
            Held(
                node=node,
                layers=offer.layers,
                state=offer.state,
                layer_seconds=Seconds(offer.layer_seconds),
                overhead_seconds=Seconds(offer.overhead_seconds),
                queue=offer.queue,
                free_tokens=offer.free_tokens,
                compute=offer.compute,
            )
            for node, offer in self._of(name)
            if offer.total_layers == first.total_layers
        ]
        route = cheapest_route(
            first.total_layers,
            held,
            latency=lambda a, b: 0.0 if a == b else HOP_S,
            gateway=self._me,
            need_tokens=need_tokens,
            avoid=avoid | self._doubtful(),
            model=name,
        )
        stops = tuple(Stop(hop.node, hop.layers) for hop in route.stages)
        return Plan(first.model, route.compute, stops)

    def _of(self, name: str) -> list[tuple[NodeId, StageOffer]]:
        """The offers of one model. Two checkpoints may share a name: the gateway's tokenizer
        decides which is meant.
        """
        by_node = {node: offer for node, offer in self._offers() if offer.model_name == name}
        offers = list(by_node.items())  # one slice of a model a node: more would be a lie
        checkpoint = self._catalogue.known(name)
        wanted = checkpoint.model_id if checkpoint else offers[0][1].model if offers else None
        return [(node, offer) for node, offer in offers if offer.model == wanted]
