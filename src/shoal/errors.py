"""Every error that shoal raises on purpose, but for two that only HTTP knows (`api/failures.py`).

ShoalError(message, hint)            caught in cli/ and api/; the hint is the line "try: ..."
├─ LocalError                        ours: raise, punish nobody
│  ├─ InvalidRequest(param)          the caller asked for something impossible: HTTP 400, exit 2
│  │  ├─ PromptTooLong               names the length that is allowed
│  │  └─ BadTicket                   a mangled or foreign invitation
│  ├─ BadConfig                      a setting or file that cannot be used: exit 2
│  ├─ NotRunning                     no node answers on this machine: exit 3
│  ├─ ModelNotFound                  no checkpoint under that name: HTTP 404, exit 1
│  ├─ UnsupportedModel               says what the loader lacks: exit 1
│  ├─ EngineMissing                  torch and friends are not installed: exit 1
│  ├─ NoRoute                        nobody holds some layers: HTTP 503 + Retry-After, exit 4
│  ├─ Overloaded(retry_after_s)      queue or pages are full: HTTP 429 + Retry-After, exit 4
│  ├─ NoCapacity                     this machine cannot hold what was asked: exit 4
│  ├─ StageLost                      a stage died and nobody could replace it: HTTP 502, error event
│  ├─ BackendFailed(status)          the engine behind --backend failed; another route is taken
│  ├─ LinkClosed                     the connection to a node ended; pipeline/ takes another route
│  └─ Refused                        a policy forbids it: HTTP 403, exit 5
└─ PeerError(penalty)                theirs: transport/ drops the peer and counts it
   ├─ BadFrame                       wrong version, magic or lengths
   ├─ FrameTooLarge                  refused before anything was allocated
   ├─ BadMessage                     the header does not decode, or does not fit the session
   └─ BadProof                       the peer is not who it says it is
"""

from __future__ import annotations

from typing import Literal


class ShoalError(Exception):
    """Base of all. `str(error)` says what and why; `hint` says what to do."""

    exit_code = 1
    http_status = 500
    code = "internal_error"

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


Relief = Literal["none", "possible", "coming"]


class LocalError(ShoalError):
    """Our side's doing, or the user's: nobody is punished.

    Where layers are missing, `relief` says whether a node could come to hold them, or is about to.
    """

    relief: Relief = "none"


class InvalidRequest(LocalError):
    exit_code = 2
    http_status = 400
    code = "invalid_value"

    def __init__(self, message: str, *, hint: str = "", param: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.param = param


class PromptTooLong(InvalidRequest):
    code = "context_length_exceeded"


class BadTicket(InvalidRequest):
    code = "bad_ticket"


class BadConfig(LocalError):
    exit_code = 2
    code = "bad_config"


class NotRunning(LocalError):
    exit_code = 3
    code = "not_running"


class ModelNotFound(LocalError):
    http_status = 404
    code = "model_not_found"


class UnsupportedModel(LocalError):
    http_status = 400
    code = "unsupported_model"


class EngineMissing(LocalError):
    code = "engine_missing"


class NoRoute(LocalError):
    exit_code = 4
    http_status = 503
    code = "no_route"


class Overloaded(LocalError):
    exit_code = 4
    http_status = 429
    code = "overloaded"

    def __init__(self, message: str, *, hint: str = "", retry_after_s: float = 1.0) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class NoCapacity(LocalError):
    exit_code = 4
    http_status = 503
    code = "no_capacity"


class StageLost(LocalError):
    http_status = 502
    code = "stage_lost"


class BackendFailed(LocalError):
    """`status` is that of its HTTP answer, None when there was none."""

    http_status = 502
    code = "backend_failed"

    def __init__(self, message: str, *, hint: str = "", status: int | None = None) -> None:
        super().__init__(message, hint=hint)
        self.status = status


class LinkClosed(LocalError):
    code = "link_closed"


class Refused(LocalError):
    exit_code = 5
    http_status = 403
    code = "refused_by_policy"


class PeerError(ShoalError):
    """The peer's doing. `penalty` is what it costs the peer in our eyes."""

    code = "peer_error"
    penalty = 1


class BadFrame(PeerError):
    code = "bad_frame"


class FrameTooLarge(PeerError):
    code = "frame_too_large"


class BadMessage(PeerError):
    code = "bad_message"


class BadProof(PeerError):
    code = "bad_proof"
    penalty = 10
