"""docs/scale.md says what the code does: its table, its constants, and a mesh that runs."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from shoal.bus.base import MAX_KEPT
from shoal.bus.cells import MAX_DEPTH, CellsConfig
from shoal.bus.doubts import ANSWER_S, ENOUGH, MUTE_S, REFUTE_S, WITNESSES
from shoal.bus.membership import MembershipConfig
from shoal.bus.memory_relay import MemoryRelay
from shoal.bus.stamps import LEAST_AUTHORS, TOLERATED_S
from shoal.bus.view import MAX_NODES
from shoal.transport.heartbeat import HeartbeatConfig
from shoal.transport.rtt import PING_S

from .figures import LINKS, event_bytes, figures
from .test_scale import Members, in_virtual_time

PAGE = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
SIZES = (100, 1000, 10_000)


def rows() -> list[list[float]]:
    """The numbers of the table, line by line."""
    lines = [line for line in PAGE.splitlines() if line.startswith("|")][2:]
    return [[float(cell) for cell in line.strip("|").split("|")[1:]] for line in lines]


def test_the_table_is_what_the_constants_of_the_code_give() -> None:
    expected = [
        (
            *(each.depth, each.heard, each.refresh_s, each.node_in, each.node_in_bytes / 1000),
            *(each.relay_in, each.relay_out, each.relay_out_bytes / 1000, each.busy_node_in),
            *(each.death_in, each.beats_bytes / 1000, each.all_pairs_bytes / 1000),
        )
        for each in map(figures, SIZES)
    ]
    assert len(rows()) == len(expected[0])
    for row, values in zip(rows(), zip(*expected, strict=True), strict=True):
        assert row == pytest.approx(list(values), rel=0.05)
    assert event_bytes() == pytest.approx(2000, rel=0.05)


def test_the_constants_that_the_page_names_are_those_of_the_code() -> None:
    cells, config = CellsConfig(), MembershipConfig()
    assert (cells.fewest, cells.most, cells.widest, MAX_DEPTH, MAX_KEPT) == (96, 384, 2048, 8, 500)
    assert (cells.settle_s, cells.hold_s, cells.rest_s, cells.max_rest_s) == (5, 600, 600, 7200)
    assert (config.lifetime_s, config.refresh_s, config.heard_per_s) == (120, 40, 2.5)
    assert (config.load_s, config.refute_s, ANSWER_S, MUTE_S) == (5, 1, 10, 60)
    assert (REFUTE_S, WITNESSES, ENOUGH, LINKS, MAX_NODES) == (2, 8, 3, 8, 4096)
    beats = HeartbeatConfig()
    assert (beats.beat_after_s, beats.dead_after_s, PING_S) == (0.25, 0.9, 5)
    assert (TOLERATED_S, LEAST_AUTHORS) == (25, 3)


def test_a_mesh_that_runs_costs_what_the_arithmetic_says() -> None:
    """Scaled down: 200 nodes in cells of a twelfth of the size, each speaking as often."""
    config = MembershipConfig(heard_per_s=0.2, cells=CellsConfig(fewest=8, most=32))
    expected, counted = figures(200, config), list[int]()

    async def world(mesh: Members) -> None:
        relay = mesh.relays[0]
        for _ in range(200):
            await mesh.join(config=config)
            await asyncio.sleep(0.02)
        await asyncio.sleep(1.5 * expected.refresh_s)
        before, seconds = relay.delivered["announcement"], expected.refresh_s
        await asyncio.sleep(seconds)
        counted.append(relay.delivered["announcement"] - before)
        depths = [member.listening.depth for member in mesh.members]
        heard = [member.view.heard_at(member.listening.depth) for member in mesh.members]
        assert sorted(depths)[100] == expected.depth
        assert sum(heard) / len(heard) == pytest.approx(expected.heard, rel=0.2)
        assert max(heard) <= config.cells.most
        rate = counted[0] / seconds
        assert rate == pytest.approx(expected.relay_out, rel=0.2)
        assert rate / 200 == pytest.approx(expected.node_in, rel=0.2)

    in_virtual_time(world, MemoryRelay(delay_s=0.05))
