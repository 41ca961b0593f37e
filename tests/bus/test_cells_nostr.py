"""Cells and clocks over real relays."""

from __future__ import annotations

import hashlib
import time

import pytest

from shoal.bus.base import MAX_KEPT
from shoal.bus.cells import cell_of, common_depth
from shoal.bus.nostr import NostrBus
from shoal.bus.relay import EmbeddedRelay
from shoal.identity import Identity

from .nodes import AMBER, BIRCH, CLUB, CORAL, Ear, announcement
from .worlds import QUICK

pytestmark = pytest.mark.anyio


def sharing(depth: int, count: int) -> list[Identity]:
    """Nodes whose deepest cell in common with amber's is of that depth."""
    made = (Identity.from_secret(hashlib.sha256(b"%d" % n).digest()) for n in range(4000))
    ours = cell_of(AMBER.node)
    found = (who for who in made if common_depth(ours, cell_of(who.node)) == depth)
    return [next(found) for _ in range(count)]


async def test_a_bus_hears_its_cell_only_and_what_is_kept_of_it_when_it_turns_there() -> None:
    (far,), (near,) = sharing(0, 1), sharing(2, 1)
    async with EmbeddedRelay() as relay:
        amber = NostrBus(AMBER, CLUB, [relay.url], config=QUICK)
        ear = Ear().at(amber)
        async with (
            amber,
            NostrBus(far, CLUB, [relay.url], config=QUICK) as far_bus,
            NostrBus(near, CLUB, [relay.url], config=QUICK) as near_bus,
        ):
            await amber.listen_to(2)
            await far_bus.announce(announcement(far))
            await near_bus.announce(announcement(near))
            await ear.until(lambda: ear.heard() == [(near.node, 1)])
            await far_bus.announce(announcement(far, 2))
            await near_bus.announce(announcement(near, 2))
            await ear.until(lambda: (near.node, 2) in ear.heard())
            assert {node for node, _ in ear.heard()} == {near.node}
            await amber.listen_to(0)
            await ear.until(lambda: (far.node, 2) in ear.heard())
            await far_bus.withdraw()
            await ear.until(lambda: ear.gone == [far.node])
            await amber.listen_to(3)
            await near_bus.withdraw()
            await far_bus.announce(announcement(far, 3))
            await amber.send_sealed(near.node, b"letters need no cell")
            assert near.node not in ear.gone


async def test_a_relay_gives_as_many_kept_notes_as_we_ask_for() -> None:
    count = MAX_KEPT + 20
    crowd = [Identity.from_secret(hashlib.sha256(b"c%d" % n).digest()) for n in range(count)]
    async with EmbeddedRelay() as relay:
        async with NostrBus(BIRCH, CLUB, [relay.url], config=QUICK) as birch:
            for who in crowd:
                birch._keys = NostrBus(who, CLUB)._keys  # one connection speaks for all
                birch._stamps._last = 0
                await birch.announce(announcement(who))
        amber = NostrBus(AMBER, CLUB, [relay.url], config=QUICK)
        ear = Ear().at(amber)
        async with amber:
            await ear.until(lambda: len(ear.announced) >= MAX_KEPT)


@pytest.mark.parametrize("skew_s", [-7200.0, 7200.0])
async def test_a_node_whose_clock_is_wrong_is_seen_and_sees(skew_s: float) -> None:
    crowd = sharing(0, 3)
    async with EmbeddedRelay() as relay:
        buses = [NostrBus(who, CLUB, [relay.url], config=QUICK) for who in crowd]
        amber = NostrBus(AMBER, CLUB, [relay.url], config=QUICK, clock=lambda: time.time() + skew_s)
        ears, offsets = [Ear().at(bus) for bus in buses], list[float]()
        ear = Ear()
        amber.listen(ear.announced.append, ear.gone.append, on_clock=offsets.append)
        async with buses[0], buses[1], buses[2], amber:
            await amber.announce(announcement(AMBER, sent_at=int(amber.now())))
            for sequence in (0, 1):
                for bus, who in zip(buses, crowd, strict=True):
                    await bus.announce(announcement(who, sequence))
            await ear.until(lambda: bool(offsets))
            assert offsets[0] == pytest.approx(-skew_s, abs=3)
            for bus, who in zip(buses, crowd, strict=True):
                await bus.announce(announcement(who, 2))
            await ear.until(lambda: len({node for node, _ in ear.heard()}) == 3)
            await amber.announce(announcement(AMBER, 2, sent_at=int(amber.now())))
            await ears[0].until(lambda: (AMBER.node, 2) in ears[0].heard())
            await amber.withdraw()
            await ears[1].until(lambda: AMBER.node in ears[1].gone)
            late = NostrBus(CORAL, CLUB, [relay.url], config=QUICK)
            late_ear = Ear().at(late)
            async with late:
                await late_ear.until(lambda: len(late_ear.announced) == 3)
            assert AMBER.node not in {node for node, _ in late_ear.heard()}
