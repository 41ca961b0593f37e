"""Drafts by a second, smaller model with the same tokens, whole on the node of the first layers.

It computes greedily, all sessions together, in a KV cache of its own. What it says is only a guess:
nothing here can change a text. Where its cache has no room, or a long prompt is not read yet, there
is no draft.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from ..errors import InvalidRequest, NoCapacity, Overloaded, UnsupportedModel
from ..models.checkpoint import Checkpoint
from ..models.gguf_checkpoint import GgufCheckpoint
from ..models.slice import ModelSlice, load_slice
from ..units import Quant, SessionId, readable_bytes
from .draft import Wish, rewinds
from .pages import PagePool
from .rows import Row
from .stage import Stage, StageConfig, pages_for

CATCH_UP_TOKENS = 256  # of prompts, read in one call: the stage itself waits for it
CONTEXTS = 16  # full ones in the cache, unless it is said how many tokens it shall hold


@dataclass(slots=True)
class _Session:
    """`ids` are those whose keys and values the cache holds; the first `sure` are no guess."""

    pages: tuple[int, ...] = ()
    ids: list[int] = field(default_factory=list)
    sure: int = 0


@dataclass(slots=True)
class _Going:
    """One wish on its way: `rest` are the tokens to compute next, after those of the session."""

    at: int  # which wish
    wish: Wish
    session: _Session
    rest: Sequence[int]
    draft: list[int] = field(default_factory=list)


class ModelDrafter:
    """The `Drafter` of a stage that holds a whole model of `context_length` positions."""

    def __init__(self, stage: Stage, context_length: int) -> None:
        self._stage, self._context_length = stage, context_length
        self._pool = PagePool(stage.config.pages, stage.config.page_size)
        self._sessions: dict[SessionId, _Session] = {}

    def is_quick(self, wishes: Sequence[Wish]) -> bool:
        return False

    def draft(self, wishes: Sequence[Wish]) -> list[tuple[int, ...]]:
        drafts: list[tuple[int, ...]] = [()] * len(wishes)
        going = [each for at, wish in enumerate(wishes) if (each := self._prepared(at, wish))]
        going = self._within_budget(going)
        while going:
            self._step(going)
            for each in going:
                drafts[each.at] = tuple(each.draft)
            going = [each for each in going if len(each.draft) < each.wish.count]
        return drafts

    def forget(self, session: SessionId) -> None:
        known = self._sessions.pop(session, None)
        if known is not None and known.pages:
            self._pool.free(known.pages)

    # ---- what is computed already

    def _prepared(self, at: int, wish: Wish) -> _Going | None:
        """Room for the wish, and what of it is in the cache; None when there is no room."""
        length = len(wish.ids) + wish.count
        if not wish.ids or length > self._context_length:
            return None
        session = self._sessions.setdefault(wish.session, _Session())
        if not self._grown(session, length):
            self.forget(wish.session)
            return None
        kept = session.sure
        most = min(len(session.ids), len(wish.ids) - 1)  # the last one is computed for its logits
        while kept < most and session.ids[kept] == wish.ids[kept]:
            kept += 1
        del session.ids[min(kept, most) :]
        session.sure = len(session.ids)
        return _Going(at, wish, session, wish.ids[session.sure :])

    def _grown(self, session: _Session, tokens: int) -> bool:
        missing = tokens - len(session.pages) * self._pool.page_size
        with suppress(NoCapacity, Overloaded):
            if missing > 0:
                session.pages += self._pool.allocate(missing)
            return True
        return False

    def _within_budget(self, going: Sequence[_Going]) -> list[_Going]:
        """Those with little left to read; another reads on, for next time."""
        ready: list[_Going] = []
        budget = CATCH_UP_TOKENS
        for each in going:
            part = each.rest[:budget]
            budget -= len(part)
            if len(part) == len(each.rest):
                ready.append(each)
            elif part:
                each.rest = part
                self._compute([each])
        return ready

    # ---- computing

    def _step(self, going: Sequence[_Going]) -> None:
        """One token more for each."""
        for each, token in zip(going, self._compute(going), strict=True):
            each.draft.append(token)
            each.rest = (token,)

    def _compute(self, going: Sequence[_Going]) -> list[int]:
        """The best token after each one's `rest`, which is in the cache then."""
        rows = []
        for each in going:
            known = each.session
            start, ids = len(known.ids), list(each.rest)
            rows.append(Row(each.wish.session, start, known.pages, len(ids), ids))
            known.ids += ids
            known.sure = min(len(known.ids), len(each.wish.ids))
        tokens: list[int] = self._stage.logits(rows, range(len(rows))).argmax(-1).tolist()
        return tokens


def load_drafter(
    draft: Checkpoint,
    model: Checkpoint,
    *,
    memory_bytes: int,
    kv_tokens: int = 0,
    dtype: str | None = None,
    quant: Quant = "none",
    device: str = "cpu",
) -> tuple[ModelDrafter, int]:
    """A drafter for `model`, and the bytes that its weights and cache take of `memory_bytes`.

    Raises InvalidRequest for a GGUF file and when the two do not share their tokens, NoCapacity
    when there is no room.
    """
    if isinstance(draft, GgufCheckpoint):
        raise InvalidRequest(
            f"{draft.name} cannot draft: GGUF files are only served",
            hint="take the model in Hugging Face form, or --draft ngram, which needs none",
            param="draft",
        )
    if not rewinds(draft.config):
        raise InvalidRequest(
            f"{draft.name} cannot draft: its running state does not take back a wrong guess",
            hint="take a model without one, or --draft ngram, which needs none",
            param="draft",
        )
    check_same_tokens(draft, model)
    loaded = _load(draft, dtype, quant, device)
    weights = loaded.nbytes
    room = (memory_bytes - weights) // 4  # the larger part is the model's own
    usual = StageConfig()
    wanted = -(-(kv_tokens or CONTEXTS * draft.context_length) // usual.page_size)
    pages = min(wanted, pages_for(loaded, max(0, room), usual.page_size))
    if pages < 1:
        raise NoCapacity(
            f"the draft model {draft.name} does not fit: {readable_bytes(weights)} of weights in "
            f"{readable_bytes(memory_bytes)}",
            hint="take a smaller one, or --draft ngram, which needs none",
        )
    stage = Stage(loaded, StageConfig(pages=pages))
    taken = weights + pages * usual.page_size * stage.kv_bytes_per_token
    return ModelDrafter(stage, draft.context_length), taken


def _load(draft: Checkpoint, dtype: str | None, quant: Quant, device: str) -> ModelSlice:
    """A guess need not be exact: where the exact classes do not know the model, floats will do."""
    try:
        return load_slice(draft, draft.whole, dtype, quant, device)
    except UnsupportedModel:
        if quant == "none":
            raise
        return load_slice(draft, draft.whole, dtype, "none", device)


def check_same_tokens(draft: Checkpoint, model: Checkpoint) -> None:
    """Raises InvalidRequest unless a token id means the same in both. One may have unused ids."""
    if _vocabulary(draft) != _vocabulary(model):
        raise InvalidRequest(
            f"{draft.name} cannot draft for {model.name}: their tokens differ",
            hint="take a smaller model of the same family, or --draft ngram, which needs none",
            param="draft",
        )


def _vocabulary(checkpoint: Checkpoint) -> dict[str, int] | int:
    """By its tokenizer where there is one; else the number of ids must do."""
    try:
        return checkpoint.open_tokenizer().vocabulary
    except UnsupportedModel:
        return checkpoint.vocab_size
