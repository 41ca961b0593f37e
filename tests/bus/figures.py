"""What a mesh costs, by the constants of the code: the arithmetic of docs/scale.md."""

from __future__ import annotations

from dataclasses import dataclass

from nostr_sdk import Keys

from shoal.bus.announcement import Demand
from shoal.bus.cells import tags
from shoal.bus.coordinates import Coordinates
from shoal.bus.doubts import ENOUGH, WITNESSES
from shoal.bus.letters import announcement_text
from shoal.bus.membership import MembershipConfig
from shoal.bus.nostr_events import announcement_event
from shoal.transport.control import Beat, Ping, control_frame
from shoal.transport.frames import encode
from shoal.transport.heartbeat import HeartbeatConfig
from shoal.transport.rtt import PING_S

from .nodes import AMBER, CLUB, STAGE, announcement

LINKS = 8  # that carry work, of a busy node
CARRIED_BYTES = 22 + 52  # TLS 1.3 record, TCP with timestamps and IPv4, around a frame


@dataclass(frozen=True, slots=True)
class Figures:
    """One mesh. Events are announcements; per second unless named otherwise."""

    nodes: int
    depth: int
    heard: int  # other nodes in a cell
    refresh_s: float
    node_in: float
    node_in_bytes: float
    relay_in: float
    relay_out: float
    relay_out_bytes: float
    busy_node_in: float  # when the load of every node doubles or halves all the time
    death_in: float  # events that a node of the cell hears of one death
    beats_bytes: float  # of a busy node's links, one way
    all_pairs_bytes: float  # if everybody had a link with everybody instead


def event_bytes() -> int:
    """A usual announcement as it travels: one stage, one GPU, two addresses."""
    said = announcement(
        AMBER,
        place=Coordinates((0.0123456, 0.0234567, -0.0345678), 0.0012345, 0.123456),
        demand=(Demand(STAGE.model, 12.5),),
    )
    text = announcement_text(CLUB, said)
    keys = Keys.parse(AMBER.nostr_secret().hex())
    topics, now = tags(CLUB.topic, AMBER.node), 1_800_000_000
    event = announcement_event(keys, topics, text, created_at=now, expires_at=now + 120)
    return len(event.as_json())


def link_bytes() -> float:
    """A second of one idle link, one way: beats, and a ping now and then."""
    beat = sum(map(len, encode(control_frame(Beat())))) + CARRIED_BYTES
    ping = sum(map(len, encode(control_frame(Ping(1 << 31))))) + CARRIED_BYTES
    return beat / HeartbeatConfig().beat_after_s + 2 * ping / PING_S


def figures(nodes: int, config: MembershipConfig | None = None) -> Figures:
    config = config or MembershipConfig()
    depth = 0
    while nodes / 2**depth > config.cells.most:
        depth += 1
    heard = nodes / 2**depth - 1
    slower = config.slower(round(heard))
    refresh_s = config.refresh_s * slower
    size = event_bytes()
    return Figures(
        nodes=nodes,
        depth=depth,
        heard=round(heard),
        refresh_s=refresh_s,
        node_in=heard / refresh_s,
        node_in_bytes=heard / refresh_s * size,
        relay_in=nodes / refresh_s,
        relay_out=nodes * heard / refresh_s,
        relay_out_bytes=nodes * heard / refresh_s * size,
        busy_node_in=heard / (config.load_s * slower),
        death_in=ENOUGH + WITNESSES,
        beats_bytes=LINKS * link_bytes(),
        all_pairs_bytes=(nodes - 1) * link_bytes(),
    )
