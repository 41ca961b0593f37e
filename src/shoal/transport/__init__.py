"""How bytes travel: links between nodes that have proved who they are, and frames on them.

Knows: frames and their limits, the carriers (TLS over TCP, an in-memory twin), the proof of
identity, the heartbeat, back-pressure, and what a misbehaving peer has coming.
Does not know: what a frame means. Headers and bodies belong to whoever listens on the channel.
Start reading at `links.py`; the wire format is in `frames.py`.
"""

from .base import Carrier, Contact, Link
from .frames import CONTROL, Bytes, Frame, FrameLimits
from .heartbeat import HeartbeatConfig
from .link import LinkConfig
from .links import Links, LinksConfig
from .memory import MemoryCarrier, MemoryConfig, MemoryNetwork
from .peer import PeerConfig
from .tls import TlsCarrier, TlsConfig

__all__ = [
    "CONTROL",
    "Bytes",
    "Carrier",
    "Contact",
    "Frame",
    "FrameLimits",
    "HeartbeatConfig",
    "Link",
    "LinkConfig",
    "Links",
    "LinksConfig",
    "MemoryCarrier",
    "MemoryConfig",
    "MemoryNetwork",
    "PeerConfig",
    "TlsCarrier",
    "TlsConfig",
]
