from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest

from shoal.events import (
    DraftsVerified,
    Event,
    LinkLost,
    LinkUp,
    NodeGone,
    NodeSeen,
    PeerFault,
    RelayChanged,
    RequestDone,
    RequestStarted,
    RouteTaken,
    StageChanged,
    StepDone,
)
from shoal.telemetry import configure_logging, log_event
from shoal.telemetry.log import line_of
from shoal.units import ModelId, NodeId, SessionId, Slice

AMBER = NodeId("npub1" + "q" * 54 + "zx7f")
TINY, SESSION = ModelId("00112233445566ff"), SessionId("a" * 16)


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    logger = logging.getLogger("shoal")
    before = logger.handlers, logger.level, logger.propagate
    yield
    logger.handlers, logger.level, logger.propagate = before


@pytest.mark.parametrize(
    ("event", "level", "words"),
    [
        (NodeSeen(AMBER, "amber-fox"), logging.INFO, "amber-fox (npub1qqqq…zx7f) is here"),
        (NodeGone(AMBER, "silence"), logging.INFO, "is gone: silence"),
        (LinkUp(AMBER), logging.DEBUG, "npub1qqqq…zx7f"),
        (LinkLost(AMBER, "reset"), logging.INFO, "lost: reset"),
        (PeerFault(None, "bad_frame", 1), logging.WARNING, "an unknown peer: bad_frame"),
        (RelayChanged("wss://a", False), logging.WARNING, "wss://a lost"),
        (StageChanged(TINY, Slice(0, 4), "serving"), logging.INFO, "layers 0:4: serving"),
        (StageChanged(TINY, Slice(0, 4), "failed"), logging.ERROR, "failed"),
        (RequestStarted(SESSION, "tiny", 7), logging.DEBUG, "tiny: 7 prompt tokens"),
        (RouteTaken(SESSION, ((AMBER, Slice(0, 4)),), 1), logging.DEBUG, "zx7f 0:4"),
        (RouteTaken(SESSION, ((AMBER, Slice(0, 4)),), 2), logging.WARNING, "attempt 2"),
        (RequestDone(SESSION, "tiny", "stop", 10, 2.0), logging.INFO, "5.0 a second"),
        (RequestDone(SESSION, "tiny", "stage_lost", 0, 0.0), logging.WARNING, "stage_lost"),
    ],
)
def test_events_are_told_in_words(event: Event, level: int, words: str) -> None:
    line = line_of(event)
    assert line is not None
    assert line[0] == level
    assert words in line[1]


def test_steps_are_too_many_to_tell() -> None:
    assert line_of(StepDone(TINY, 1, 1, 0.01)) is None
    assert line_of(DraftsVerified(TINY, 4, 2)) is None


def test_lines_go_where_the_program_says_and_nowhere_else(
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, second = io.StringIO(), io.StringIO()
    configure_logging(stream=first)
    configure_logging(stream=second)
    log_event(NodeSeen(AMBER, "amber-fox"))
    log_event(LinkUp(AMBER))
    log_event(StepDone(TINY, 1, 1, 0.01))
    assert first.getvalue() == ""
    (line,) = second.getvalue().splitlines()
    assert line.endswith("INFO    node     amber-fox (npub1qqqq…zx7f) is here")
    assert capsys.readouterr() == ("", "")
