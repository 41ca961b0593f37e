"""Who else is there: members of a mesh find each other and exchange short sealed messages.

Knows: Nostr relays (ours and others'), announcements, goodbyes, discovery of relays in the LAN.
Does not know: links between nodes, models' contents, which slice is whose.
All that arrives is a stranger's until `inbox.py` has checked it; the bus may lose any of it.
Start reading at `base.py`, then `announcement.py`; `membership.py` puts the pure parts together
(`view.py` who is there, `cells.py` whom to listen to, `doubts.py` who may have died).
nostr_sdk lives in `nostr*.py` and `relay.py` only.
"""

from .announcement import Announcement, StageOffer
from .base import Bus, RelayStatus
from .view import MeshView

__all__ = ["Announcement", "Bus", "MeshView", "RelayStatus", "StageOffer"]
