"""What a stage says to an Open before it sets anything aside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..engine.request import Sampling
from ..errors import BadMessage, InvalidRequest, Overloaded
from ..units import NodeId, Slice
from .messages import Open, Refused, one_line
from .session import Send

if TYPE_CHECKING:
    from ..engine.sampling import SamplerState

MakeSampler = Callable[[Sampling, Sequence[int], Sequence[int]], "SamplerState"]


@dataclass(frozen=True, slots=True)
class Opening:
    """`most_tokens` is the longest that a session can ever be here."""

    begins: Callable[[Slice], bool]  # whether who runs these layers is the first stage
    ends: Callable[[Slice], bool]
    vocab_size: int
    most_tokens: int
    make_sampler: MakeSampler

    def check(self, message: Open, ids: Sequence[int]) -> None:
        """Raises BadMessage where no honest gateway could have sent this."""
        if self.begins(message.layers) and len(ids) != message.known_tokens:
            raise BadMessage(
                f"the first stage needs {message.known_tokens} token ids, got {len(ids)}"
            )
        if len(ids) not in (0, message.output_tokens, message.known_tokens):
            raise BadMessage("token ids must be all known ones, the output's, or none")
        if self.ends(message.layers) and message.sampling is None:
            raise BadMessage("the last stage needs the sampling settings")

    def impossible(self, message: Open, ids: Sequence[int]) -> str:
        """Why this session can never be here, or ""."""
        wanted = message.reserve_tokens
        if wanted > self.most_tokens:
            return f"{wanted} tokens wanted, a session here has {self.most_tokens} at most"
        if ids and max(ids) >= self.vocab_size:
            return f"token id {max(ids)} is outside the vocabulary of {self.vocab_size}"
        return ""

    def sampler(
        self, message: Open, ids: Sequence[int], gateway: NodeId
    ) -> SamplerState | Send | None:
        """None but on a last stage; a refusal where the grammar cannot be had."""
        if not self.ends(message.layers) or message.sampling is None:
            return None
        prompt_tokens = len(ids) - message.output_tokens
        try:
            return self.make_sampler(message.sampling, ids[:prompt_tokens], ids[prompt_tokens:])
        except InvalidRequest as wrong:
            return refuse(message, gateway, "invalid", wrong.message)
        except Overloaded as busy:
            return refuse(message, gateway, "busy", busy.message)


def refuse(
    message: Open,
    gateway: NodeId,
    reason: Literal["busy", "never", "gone", "unreachable", "invalid"],
    why: str,
) -> Send:
    return Send(gateway, Refused(message.session, reason, one_line(why)))
