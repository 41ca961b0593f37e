"""What layers remember that keep a running state: for each session one slot of fixed size, beside
the pages of the layers that look back.

A state is that of all tokens read so far. It cannot be found again in the middle of a text, and not
take back what it has read: rows go on where the last one ended or begin anew at 0, without drafts.

T new tokens, all rows together · B rows of one length · N tokens of each · E hidden width
"""

# ruff: noqa: N803, N806 - the letters at the end of a tensor's name are its axes

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..models.mixers import Mixer
from ..units import SessionId
from .pools import allocate
from .rows import Row

Key = tuple[str, int]  # "conv" or "recurrent", and its number: some layers have several
TORN = -1


@dataclass(frozen=True, slots=True)
class StateShape:
    """Of one session in one layer."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


LayerStates = dict[Key, StateShape]
StateLayout = dict[int, LayerStates]  # by layer index


def state_bytes(layout: StateLayout) -> int:
    """Of one session in all layers."""
    return sum(state.nbytes for layer in layout.values() for state in layer.values())


class Held:
    """The states of some rows in one layer, (B, ...) each, as a model's own code asks for them."""

    def __init__(self, states: Mapping[Key, Tensor]) -> None:
        self.states = dict(states)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.states.get(("conv", state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.states.get(("recurrent", state_idx))

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> Tensor:
        """New columns (B, channels, N); returns them after those that were kept."""
        kept = self.states["conv", state_idx]
        columns = torch.cat((kept, conv_states), -1)
        self.states["conv", state_idx] = columns[..., -kept.shape[-1] :]
        return columns

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> Tensor:
        self.states["recurrent", state_idx] = recurrent_states
        return recurrent_states

    def has_previous_state(self, *_: Any, **__: Any) -> bool:
        return True

    def is_recording_past(self, *_: Any, **__: Any) -> bool:
        return False


class Noted(Held):
    """Stands for the states of one row that begins, and notes what they are."""

    def __init__(self) -> None:
        super().__init__({})
        self.layer: LayerStates = {}

    def update_conv_state(
        self,
        conv_states: Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **_: Any,
    ) -> Tensor:
        width = conv_kernel_size or conv_states.shape[-1]
        shape = (*conv_states.shape[1:-1], width)
        self.layer["conv", state_idx] = StateShape(shape, conv_states.dtype)
        return conv_states

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> Tensor:
        shape = tuple(recurrent_states.shape[1:])
        self.layer["recurrent", state_idx] = StateShape(shape, recurrent_states.dtype)
        return recurrent_states

    def begun(self, device: torch.device) -> Held:
        """The states of a row before its first token."""
        return Held(
            {
                key: torch.zeros(1, *state.shape, dtype=state.dtype, device=device)
                for key, state in self.layer.items()
            }
        )

    def has_previous_state(self, *_: Any, **__: Any) -> bool:
        return False


@dataclass(slots=True)
class _Slot:
    number: int
    read: int = 0  # tokens that its states have read; TORN when a forward broke off


@dataclass(frozen=True, slots=True)
class _Turn:
    """Rows of one length, asked together. `tokens` are their places among all, in order."""

    tokens: Tensor  # (B * N,)
    slots: Tensor  # (B,)


class SessionStates:
    """The slots of one stage. `begin` a step with all of its rows, `select` those of each forward,
    `end` the step when it is done.
    """

    def __init__(self, layout: StateLayout, slots: int, device: torch.device) -> None:
        self._pools = {
            index: {
                key: allocate(slots, *state.shape, dtype=state.dtype, device=device)
                for key, state in layer.items()
            }
            for index, layer in layout.items()
        }
        self._device = device
        self._free = list(range(slots))
        self._slots: dict[SessionId, _Slot] = {}
        self._turns: list[_Turn] = []

    def begin(self, rows: Sequence[Row]) -> None:
        """Raises ValueError for a row that does not go on where its session's states stand."""
        if not self._pools:
            return
        for row in rows:
            self._check(row)
        for row in rows:
            if row.start == 0:
                self._clear(self._slots[row.session].number)
            self._slots[row.session].read = TORN

    def select(self, rows: Sequence[Row]) -> None:
        if self._pools:
            self._turns = self._in_turns(rows)

    def end(self, rows: Sequence[Row]) -> None:
        if self._pools:
            for row in rows:
                self._slots[row.session].read = row.stop

    def forget(self, session: SessionId) -> None:
        """It has ended: its slot is for another."""
        slot = self._slots.pop(session, None)
        if slot is not None:
            self._free.append(slot.number)

    def mix(self, layer: int, mixer: Mixer, x_1TE: Tensor) -> Tensor:
        """As `models/mixers.py` wants it."""
        pools = self._pools[layer]
        out = torch.empty_like(x_1TE)
        for turn in self._turns:
            held = Held({key: pool.index_select(0, turn.slots) for key, pool in pools.items()})
            x_BNE = x_1TE[0].index_select(0, turn.tokens).view(len(turn.slots), -1, x_1TE.shape[2])
            out[0].index_copy_(0, turn.tokens, mixer(x_BNE, held).flatten(0, 1))
            for key, state in held.states.items():
                pools[key].index_copy_(0, turn.slots, state.to(pools[key].dtype))
        return out

    # ---- slots

    def _check(self, row: Row) -> None:
        if row.draft:
            raise ValueError("a running state cannot take back a draft")
        slot = self._slots.get(row.session)
        stands = slot.read if slot is not None else 0
        if row.start not in (0, stands):
            raise ValueError(f"the states have not read the tokens before {row.start}, and no more")
        if slot is None:
            if not self._free:
                raise ValueError(f"all {len(self._slots)} slots for states are in use")
            self._slots[row.session] = _Slot(self._free.pop())

    def _clear(self, slot: int) -> None:
        for layer in self._pools.values():
            for pool in layer.values():
                pool[slot].zero_()

    def _in_turns(self, rows: Sequence[Row]) -> list[_Turn]:
        """Rows of one token all together, longer ones one by one."""
        single: list[tuple[int, int]] = []  # first token, slot
        turns: list[_Turn] = []
        at = 0
        for row in rows:
            slot = self._slots[row.session].number
            if row.count == 1:
                single.append((at, slot))
            else:
                turns.append(self._turn(range(at, at + row.count), [slot]))
            at += row.count
        if single:
            turns.append(self._turn(*zip(*single, strict=True)))
        return turns

    def _turn(self, tokens: Sequence[int], slots: Sequence[int]) -> _Turn:
        return _Turn(
            torch.tensor(tokens, device=self._device), torch.tensor(slots, device=self._device)
        )
