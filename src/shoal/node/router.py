"""Joins what the mesh announces with what this machine can open: which models there are, and by
which route.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from msgspec.structs import replace

from ..bus import Announcement, StageOffer
from ..errors import ModelNotFound, NoRoute, Relief, ShoalError
from ..models.catalogue import Catalogue
from ..models.checkpoint import Checkpoint
from ..models.text import Tokenizer
from ..pipeline import ANY_TOKEN, Plan, Stop, Wish
from ..pipeline.messages import Load
from ..placement import Held, Trip
from ..placement.routes import few_of_each
from ..units import EXACT, ModelId, NodeId
from .distances import NEARBY_S
from .loads import Loads
from .relief import relief
from .routing import Chooser, Session

MAX_MODELS = 64  # that we speak of: strangers may announce names without end


class Router:
    """`offers` yields every stage that is announced, our own included; `doubtful` are nodes that we
    cannot reach now, `suspects` those that others say they cannot: without them if there is a way.
    """

    def __init__(
        self,
        me: NodeId,
        catalogue: Catalogue,
        offers: Callable[[], Iterator[tuple[NodeId, StageOffer]]],
        doubtful: Callable[[], frozenset[NodeId]],
        *,
        suspects: Callable[[], frozenset[NodeId]] = frozenset,
        announcements: Callable[[], Sequence[Announcement]] = tuple,
        chooser: Chooser | None = None,
    ) -> None:
        self._me, self._catalogue = me, catalogue
        self._offers, self._doubtful, self._suspects = offers, doubtful, suspects
        self._announcements = announcements
        self._chooser = chooser or Chooser(lambda a, b: NEARBY_S, time.monotonic)
        self._loads = Loads(self._chooser.clock)

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
        return self._chooser.possible(*self._asked(Wish(name, 1)))

    def plan(self, wish: Wish) -> Plan:
        """The route that a new session takes. Raises NoRoute naming the layers that nobody holds,
        ModelNotFound when nobody serves the model at all; both say whether help is to be expected.
        """
        try:
            return self._planned(wish)
        except (NoRoute, ModelNotFound) as error:
            error.relief = self._relief(wish)
            raise

    def _planned(self, wish: Wish) -> Plan:
        session, held = self._asked(wish)
        route = self._chooser.choose(session, held)
        self._chooser.remember(session, route)
        new = [node for node, _ in route.hops if node not in {stop.node for stop in wish.keep}]
        self._loads.planned(new, session.model, wish.need_tokens)
        stops = tuple(Stop(node, part) for node, part in route.hops)
        checkpoint = self._catalogue.get(wish.model_name)
        vocab_size = checkpoint.vocab_size if checkpoint else ANY_TOKEN
        return Plan(session.model, route.compute, stops, vocab_size)

    def _relief(self, wish: Wish) -> Relief:
        checkpoint = self._catalogue.get(wish.model_name)
        offers = [offer for _, offer in self._of(wish.model_name)]
        model = checkpoint.model_id if checkpoint else offers[0].model if offers else None
        gone = wish.avoid | self._doubtful() | self._suspects()
        there = [each for each in self._announcements() if each.node not in gone]
        return relief(model, there) if model is not None else "none"

    def on_load(self, node: NodeId, model: ModelId, load: Load) -> None:
        """A stage that opened a session for us says how busy it is."""
        self._loads.told(node, model, load)

    def _asked(self, wish: Wish) -> tuple[Session, list[Held]]:
        """The wish in routing's terms, and who may be asked for it."""
        first = self.best_offer(wish.model_name)
        session = self._session(wish, first)
        keep = frozenset(stop.node for stop in wish.keep)
        held = [
            self._loads.held(node, offer)
            for node, offer in self._of(wish.model_name)
            if node not in session.trip.avoid or node in keep  # or they would take others' places
        ]
        return session, few_of_each(held, wish.need_tokens, keep=keep)

    def _session(self, wish: Wish, first: StageOffer) -> Session:
        trip = Trip(
            layers=first.total_layers,
            gateway=self._me,
            need_tokens=wish.need_tokens,
            work=self._chooser.config.work(len(wish.prompt_ids), wish.need_tokens),
            avoid=wish.avoid | self._doubtful(),
            keep=tuple((stop.node, stop.layers) for stop in wish.keep),
            compute=wish.compute if wish.keep or wish.compute in EXACT else None,
            model=wish.model_name,
        )
        names = self._chooser.affinity.names(first.model, wish.prompt_ids)
        return Session(first.model, trip, names, self._suspects() - trip.avoid)

    def _of(self, name: str) -> list[tuple[NodeId, StageOffer]]:
        """The offers of one model, under whatever name: a folder's files may be a hub's. Two
        checkpoints may share a name: the gateway's tokenizer decides which is meant, and without
        one the number of nodes.
        """
        offers = list(self._offers())
        if checkpoint := self._catalogue.get(name):
            wanted = checkpoint.model_id, checkpoint.layers
        else:
            named = {node: offer for node, offer in offers if offer.model_name == name}
            kinds = Counter((offer.model, offer.total_layers) for offer in named.values())
            if not kinds:
                return []
            wanted = kinds.most_common(1)[0][0]
        by_node = {n: offer for n, offer in offers if (offer.model, offer.total_layers) == wanted}
        return list(by_node.items())  # one slice of a model a node: more would be a lie
