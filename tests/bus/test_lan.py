from typing import Any

import pytest
from zeroconf.asyncio import AsyncServiceInfo

from shoal.bus.lan import SERVICE, LanDiscovery
from shoal.identity import Identity, Mesh

from .nodes import AMBER, BIRCH, CLUB, CORAL, Ear

LOOPBACK = ["127.0.0.1"]


def found_by(discovery: LanDiscovery, **changes: Any) -> list[str]:
    said = {"v": "1", "topic": CLUB.topic, "node": BIRCH.node, **changes.pop("said", {})}
    fields = {"port": 7471, "parsed_addresses": ["192.168.1.4"], **changes}
    info = AsyncServiceInfo(SERVICE, f"x.{SERVICE}", properties=said, **fields)
    return discovery._urls(info)


@pytest.mark.anyio
async def test_nodes_of_one_mesh_find_each_others_relays_and_no_others() -> None:
    found: list[str] = []
    other = Mesh.public("other-club")
    ear = Ear()

    def discovery(who: Identity, mesh: Mesh, urls: list[str], port: int) -> LanDiscovery:
        return LanDiscovery(who.node, mesh, urls.append, port=port, interfaces=LOOPBACK)

    strangers: list[str] = []
    async with (
        discovery(AMBER, CLUB, [], 7471),
        discovery(CORAL, other, strangers, 7472),
        discovery(BIRCH, CLUB, found, 0),
    ):
        await ear.until(lambda: found == ["ws://127.0.0.1:7471"])
    assert strangers == []


def test_what_is_said_in_the_lan_is_a_hint_of_bounded_size() -> None:
    discovery = LanDiscovery(AMBER.node, CLUB, print)
    assert found_by(discovery) == ["ws://192.168.1.4:7471"]
    assert found_by(discovery, said={"topic": "shoal/other"}) == []
    assert found_by(discovery, said={"v": "2"}) == []
    assert found_by(discovery, said={"node": AMBER.node}) == []
    assert found_by(discovery, port=0) == []
    many = [f"10.0.0.{last}" for last in range(1, 100)]
    assert len(found_by(discovery, parsed_addresses=many)) == 4
    assert found_by(discovery, parsed_addresses=["fe80::1"]) == []


@pytest.mark.anyio
async def test_a_machine_without_a_usable_network_goes_on() -> None:
    async with LanDiscovery(AMBER.node, CLUB, print, interfaces=["203.0.113.7"]) as discovery:
        assert "no discovery" in discovery.error
