"""How long a message takes between any two nodes: measured, else estimated, else assumed.

Measured is only what we have a link with. For the rest each node announces its coordinates, which
it finds from the few ways that it measured itself (`bus/coordinates.py`).
"""

from __future__ import annotations

import ipaddress
import random
from collections.abc import Callable
from functools import lru_cache

from ..bus import Announcement
from ..bus.coordinates import Coordinates
from ..identity.places import split_address
from ..units import NodeId

UNKNOWN_S = 0.05  # one way, between nodes of which nothing is known
NEARBY_S = 0.0005  # in one local network, or on one machine

MOST_WAYS = 32  # that are remembered
AGAIN = 4  # of them count once more with each that is measured

Latency = Callable[[NodeId, NodeId], float]


class Distances:
    """`said(node)` is its announcement, if any; `rtt(node)` the measured time there and back."""

    def __init__(
        self,
        me: NodeId,
        said: Callable[[NodeId], Announcement | None],
        rtt: Callable[[NodeId], float | None],
        *,
        chance: random.Random,
    ) -> None:
        self._me, self._said, self._rtt, self._chance = me, said, rtt, chance
        self.place = Coordinates()  # to announce
        self._ways: dict[NodeId, float] = {}  # measured, one way; the newest last
        self.addresses: tuple[str, ...] = ()  # our own, as announced

    def latency(self, a: NodeId, b: NodeId) -> float:
        """Seconds one way, any size of message; 0 from a node to itself."""
        if a == b:
            return 0.0
        if self._me in (a, b) and (rtt := self._rtt(b if a == self._me else a)) is not None:
            return rtt / 2
        ours, theirs = self._place_of(a), self._place_of(b)
        if ours.measured and theirs.measured:
            return ours.seconds_to(theirs)
        near = _networks(self._addresses_of(a)) & _networks(self._addresses_of(b))
        return NEARBY_S if near else UNKNOWN_S

    def learn(self, peer: NodeId, rtt: float) -> None:
        """The way to that node was measured once more: our own place moves a little. A few of the
        ways that were measured before count again: these nodes may say they are elsewhere by now.
        """
        if self._said(peer) is None:
            return
        before = self._chance.sample(list(self._ways), min(AGAIN, len(self._ways)))
        self._ways.pop(peer, None)
        self._ways[peer] = rtt / 2
        if len(self._ways) > MOST_WAYS:
            del self._ways[next(iter(self._ways))]
        for node in (*before, peer):
            said = self._said(node)
            if said is not None and node in self._ways:
                self.place = self.place.moved(said.place, self._ways[node], self._chance)

    def _place_of(self, node: NodeId) -> Coordinates:
        if node == self._me:
            return self.place
        said = self._said(node)
        return said.place if said else Coordinates()

    def _addresses_of(self, node: NodeId) -> tuple[str, ...]:
        if node == self._me:
            return self.addresses
        said = self._said(node)
        return said.addresses if said else ()


@lru_cache(maxsize=8192)
def _networks(addresses: tuple[str, ...]) -> frozenset[str]:
    """The local networks that a node is in, if it announces no address outside of them: private
    IPv4 /24 and IPv6 /64; loopback counts as one network.
    """
    found = set()
    for address in addresses:
        try:
            host = ipaddress.ip_address(split_address(address)[0].strip("[]").partition("%")[0])
        except ValueError:  # a name, or another carrier's
            return frozenset()
        if host.is_loopback:
            found.add("loopback")
        elif host.is_private:
            bits = 24 if host.version == 4 else 64
            found.add(str(ipaddress.ip_network((host, bits), strict=False)))
        else:
            return frozenset()
    return frozenset(found)
