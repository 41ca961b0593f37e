"""Chooses the next token of every session in a step, from the logits of the last stage.

Per row, in the order of transformers and vLLM: logit_bias, repetition penalty, presence and
frequency penalties, the grammar's mask; then the best token if the row is greedy, else temperature,
top_k, top_p, min_p and one draw. Logprobs are those of the raw logits.

A row's token depends on nothing but its own logits, its own history and (seed, output position):
not on the rows beside it, its place, the thread count or a restart. Hence the draw comes from a
counter, not from a generator with state, and every row is worked on alone, in numpy. Equal logits
are ranked by id, lowest first.

A logit that is not finite counts as -1e30 (NaN, -inf) or 1e30 (+inf), the bounds of all others: a
row of NaN yields some token and harms no other row.
"""

# Logits are (R, V): R rows, one for each session to sample · V tokens of the vocabulary.
# In the functions from `_sample_row` on they are one row (V,).

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from ..errors import InvalidRequest
from .grammar import Grammars, Matcher
from .request import Ending, Sampled, Sampling, TokenLogprob

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

GREEDY_BELOW = 1e-5  # a temperature under this is greedy: dividing by it would overflow float32
LARGEST_LOGIT = 1e30
COMPILE_WITHIN_S = 0.25  # neighbours wait for a heartbeat meanwhile


class SamplerState:
    """What the sampler remembers of one session: its settings and which tokens were seen how often.

    Built from the output so far, it goes on exactly as the state that chose that output would have.
    `matcher` is at the beginning of the output, and this state's own.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt_ids: Iterable[int],
        output_ids: Iterable[int] = (),
        matcher: Matcher | None = None,
    ) -> None:
        self.sampling = sampling
        self.matcher = matcher
        self.position = 0  # output tokens so far; the next token is number `position`
        self.seen: set[int] = set(prompt_ids)  # for repetition_penalty: prompt and output
        self.counts: Counter[int] = Counter()  # for presence and frequency: output only
        self._stops = frozenset(sampling.stop_ids)
        for token in output_ids:
            self.accept(token)

    def accept(self, token: int) -> Ending:
        """Count `token` as output; returns why the session ends here: "stop", "length" or ""."""
        self.position += 1
        self.seen.add(token)
        self.counts[token] += 1
        if self.matcher is not None:
            self.matcher.take(token)
            if self.matcher.failed:
                return "length"  # a text that is not whole
        if token in self._stops or (self.matcher is not None and self.matcher.ended):
            return "stop"
        return "length" if self.position >= self.sampling.max_tokens else ""

    @property
    def is_greedy(self) -> bool:
        return self.sampling.temperature < GREEDY_BELOW

    @property
    def is_plain(self) -> bool:
        """True when the best raw logit is all that is asked for."""
        wanted = self.sampling
        penalties = wanted.presence_penalty or wanted.frequency_penalty
        unchanged = wanted.repetition_penalty == 1.0 and not penalties and not wanted.logit_bias
        free = self.matcher is None
        return self.is_greedy and unchanged and wanted.logprobs < 0 and free


class Samplers:
    """Makes the states of one model's sessions. `grammars` may say why it cannot have any."""

    def __init__(self, grammars: Grammars | InvalidRequest) -> None:
        self._grammars = grammars

    def __call__(
        self, sampling: Sampling, prompt_ids: Iterable[int], output_ids: Iterable[int] = ()
    ) -> SamplerState:
        """Raises InvalidRequest for a grammar that cannot be used, Overloaded when it cannot yet.

        Waits for a compilation: a few milliseconds, and at most COMPILE_WITHIN_S.
        """
        if sampling.grammar is None:
            return SamplerState(sampling, prompt_ids, output_ids)
        if isinstance(self._grammars, InvalidRequest):
            raise self._grammars
        matcher = self._grammars.matcher(sampling.grammar, COMPILE_WITHIN_S)
        return SamplerState(sampling, prompt_ids, output_ids, matcher)


def sample(logits: torch.Tensor, states: Sequence[SamplerState]) -> list[Sampled]:
    """One token for each row, accepted by its state. Logits of any float dtype, on any device."""
    plain = [row for row, state in enumerate(states) if state.is_plain]
    chosen: dict[int, Sampled] = {}
    if plain:
        rows = logits if len(plain) == len(states) else logits[plain]
        best, values = _best(rows)
        for row, token, value in zip(plain, best, values, strict=True):
            if value == value:  # a row with NaN reports NaN as its best: that row goes the long way
                chosen[row] = Sampled(token, states[row].accept(token))
    for row, state in enumerate(states):
        if row not in chosen:
            chosen[row] = _sample_row(_cleaned(logits[row]), state)
    return [chosen[row] for row in range(len(states))]


def verify(
    logits: torch.Tensor, states: Sequence[SamplerState], drafts: Sequence[Sequence[int]]
) -> list[tuple[Sampled, ...]]:
    """For each state the tokens that `sample` would have chosen one by one: those that its draft
    foretold, and the first that it did not.

    Logits are (sum of 1 + length of each draft, V): what follows the token before a draft, then
    what follows each of its tokens. A token depends on nothing but its logits, history and
    position, so a wrong guess is never chosen and a right one would have been: nothing to reject.
    """
    first = list(accumulate((1 + len(draft) for draft in drafts), initial=0))
    chosen: list[list[Sampled]] = [[] for _ in states]
    going = list(range(len(states)))
    while going:
        lines = [first[row] + len(chosen[row]) for row in going]
        some = logits if len(lines) == len(logits) else logits[lines]
        for row, one in zip(going, sample(some, [states[row] for row in going]), strict=True):
            chosen[row].append(one)
        going = [row for row in going if _foretold(chosen[row], drafts[row])]
    return [tuple(each) for each in chosen]


def _foretold(chosen: Sequence[Sampled], draft: Sequence[int]) -> bool:
    """True while the last choice is what the draft says, and the session goes on."""
    at = len(chosen) - 1
    return at < len(draft) and chosen[at].token == draft[at] and not chosen[at].finish


def uniform(seed: int, position: int) -> float:
    """The draw in [0, 1) for output token `position`: 53 bits of BLAKE2b("seed:position")."""
    digest = hashlib.blake2b(b"%d:%d" % (seed, position), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53


def _best(logits: torch.Tensor) -> tuple[list[int], list[float]]:
    """The first best id of each row and its logit."""
    best = logits.detach().argmax(-1, keepdim=True)
    values = logits.detach().gather(-1, best)
    both = torch.cat((best.float(), values.float()), 1).tolist()  # ids are far below 2**24
    return [int(token) for token, _ in both], [value for _, value in both]


def _cleaned(row: torch.Tensor) -> Floats:
    """A float32 copy in host memory without NaN and infinities."""
    raw: Floats = row.detach().float().cpu().numpy()
    return np.clip(np.nan_to_num(raw, nan=-LARGEST_LOGIT), -LARGEST_LOGIT, LARGEST_LOGIT)


def _sample_row(raw: Floats, state: SamplerState) -> Sampled:
    logits = _adjusted(raw, state)
    if state.matcher is not None and not _restrict(logits, state.matcher):
        return Sampled(state.matcher.end_id, state.accept(state.matcher.end_id))
    token = int(logits.argmax()) if state.is_greedy else _draw(logits, state)
    logprob, top = _logprobs(raw, token, state.sampling.logprobs)
    return Sampled(token, state.accept(token), logprob, top)


def _adjusted(raw: Floats, state: SamplerState) -> Floats:
    """The logits after bias and penalties. Ids beyond the vocabulary are passed over."""
    wanted, logits = state.sampling, raw.copy()
    for token, bias in wanted.logit_bias.items():
        if token < len(logits):
            logits[token] += bias
    if wanted.repetition_penalty != 1.0:
        ids = _known(state.seen, len(logits))
        seen = logits[ids]
        factor = np.float32(wanted.repetition_penalty)
        logits[ids] = np.where(seen > 0, seen / factor, seen * factor)
    if wanted.presence_penalty or wanted.frequency_penalty:
        ids = _known(state.counts, len(logits))
        counts = np.fromiter((state.counts[token] for token in ids.tolist()), np.float32, len(ids))
        logits[ids] -= wanted.presence_penalty + wanted.frequency_penalty * counts
    return logits


def _restrict(logits: Floats, matcher: Matcher) -> bool:
    """Make impossible, in place, what the grammar forbids. False when it says nothing any more."""
    mask = matcher.allowed()
    if not mask:
        return False
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), count=len(logits), bitorder="little")
    allowed = bits.view(bool)  # ids that the mask does not know: False
    if not allowed.any():
        return False
    logits[~allowed] = -np.inf
    return True


def _known(tokens: Iterable[int], vocabulary: int) -> Ids:
    ids = np.fromiter(tokens, np.int64)
    return ids[(ids >= 0) & (ids < vocabulary)]


def _draw(logits: Floats, state: SamplerState) -> int:
    """Inverse of the cumulative distribution over the ids that the filters leave, ascending."""
    # The best token's weight is exactly 1: only ratios matter, so nothing is ever normalised.
    weights = np.exp((logits - logits.max()) / np.float32(state.sampling.temperature))
    ids = _filtered(logits, weights, state.sampling)
    cumulative = weights[ids].astype(np.float64).cumsum()
    target = uniform(state.sampling.seed, state.position) * cumulative[-1]
    return int(ids[np.searchsorted(cumulative, target, side="right")])


def _filtered(logits: Floats, weights: Floats, sampling: Sampling) -> Ids:
    ids = np.arange(len(logits))
    if 0 < sampling.top_k < len(logits):
        ids = _top_k(logits, sampling.top_k)
    if sampling.top_p < 1.0:
        ids = _top_p(logits, weights, ids, sampling.top_p)
    if sampling.min_p > 0.0:
        ids = ids[weights[ids] >= sampling.min_p]
    return np.sort(ids)


def _top_k(logits: Floats, k: int) -> Ids:
    """The k best ids, best first."""
    threshold = np.partition(logits, len(logits) - k)[len(logits) - k]
    return _best_first(logits, np.flatnonzero(logits >= threshold))[:k]


def _top_p(logits: Floats, weights: Floats, ids: Ids, top_p: float) -> Ids:
    """The fewest best ids that hold `top_p` of the mass of `ids`; at least one."""
    mass = weights[ids].sum(dtype=np.float64)
    # All ids below this threshold together hold less than 1 - top_p: no need to sort them.
    ids = _best_first(logits, ids[weights[ids] >= (1.0 - top_p) * mass / len(ids)])
    cumulative = weights[ids].astype(np.float64).cumsum()
    return ids[: int(np.searchsorted(cumulative, top_p * mass)) + 1]


def _best_first(logits: Floats, ids: Ids) -> Ids:
    """Ascending `ids` sorted by falling logit, equal ones by id."""
    return ids[np.argsort(-logits[ids], kind="stable")]


def _logprobs(
    raw: Floats, token: int, alternatives: int
) -> tuple[float | None, tuple[TokenLogprob, ...]]:
    """Natural logarithms of the raw probabilities: the chosen token's and those of the best."""
    if alternatives < 0:
        return None, ()
    highest = raw.max()
    shift = float(highest) + float(np.log(np.exp(raw - highest).sum(dtype=np.float64)))
    best = _top_k(raw, min(alternatives, len(raw))) if alternatives else ()
    top = tuple(TokenLogprob(int(other), float(raw[other]) - shift) for other in best)
    return float(raw[token]) - shift, top
