"""How long a stream whose route broke waits for another one. Pure.

A link that fell silent because a machine was busy is dialled anew: that takes a moment. Where a
stage is gone for good, another node may come to hold its layers: it finds out, moves and loads. As
long as that is under way the stream waits, up to when the stages that are left give up.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import Relief


@dataclass(kw_only=True, frozen=True, slots=True)
class ReunionConfig:
    moment_s: float = 1.5  # for a link to be made again
    grace_s: float = 6.0  # for who could help to begin: it has to be sure that somebody is gone
    most_s: float = 30.0  # as long as stages keep what they have
    look_s: float = 0.2  # between two looks for a route, and, after long waiting, up to
    max_look_s: float = 0.5


@dataclass
class Reunion:
    """Of one stream, since its route broke."""

    config: ReunionConfig
    _since: float | None = None
    _sign_at: float = 0.0  # when somebody was last seen to be coming

    def whole(self) -> None:
        """There is a route."""
        self._since = None

    def next_look_s(self, relief: Relief, now: float) -> float | None:
        """There is none. When to look again; None: never."""
        config = self.config
        if self._since is None or relief == "coming":
            self._sign_at = now
        self._since = now if self._since is None else self._since
        patience_s = config.moment_s if relief == "none" else config.grace_s
        waited_s = now - self._since
        if now - self._sign_at >= patience_s or waited_s >= config.most_s:
            return None
        return min(max(config.look_s, waited_s / 8), config.max_look_s)
