"""`--backend URL`: the engine of another make that this node stands in front of."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config import Settings
from ..engine.served import BackendAddress, Engine
from ..errors import BackendFailed, BadConfig
from ..models.checkpoint import Checkpoint
from ..pipeline import next_wait

MAX_KEY_BYTES = 4096


@dataclass(frozen=True, slots=True)
class BackendConfig:
    address: BackendAddress
    model: str = ""  # as the engine calls it; "" = by a name of ours, or the only one there
    slots: int = 0  # sessions at a time; 0 = as many as the engine says

    def names(self, checkpoint: Checkpoint) -> Sequence[str]:
        """What the model may be called there, the likeliest first."""
        name = checkpoint.name
        return (self.model,) if self.model else (name, name.rpartition("/")[2], f"{name}.gguf")


def backend_config(settings: Settings, *, serve: bool) -> BackendConfig | None:
    """None without a backend. Raises BadConfig for what does not go together with one."""
    if not settings.backend:
        return None
    if not settings.model:
        raise BadConfig(
            "--backend needs to know which model the engine serves: its tokenizer is read here",
            hint="say which: --backend URL --model NAME, a Hugging Face id, folder or GGUF file",
        )
    wrong = [name for name in ("layers", "dtype") if getattr(settings, name)]
    if wrong or not serve:
        name = wrong[0] if wrong else "no-serve"
        raise BadConfig(
            f"--backend and --{name} contradict: the engine computes the whole model, its way",
            hint="leave one of them out",
        )
    address = BackendAddress.parse(settings.backend, _key(settings))
    return BackendConfig(address, settings.backend_model, settings.backend_slots)


def _key(settings: Settings) -> str:
    """What is in the file, else SHOAL_BACKEND_KEY; a flag would show it to the whole machine."""
    if not settings.backend_key_file:
        return settings.backend_key
    try:
        with Path(settings.backend_key_file).expanduser().open("rb") as file:
            key = file.read(MAX_KEY_BYTES).decode("ascii").strip()
    except (OSError, ValueError) as error:
        why = f"the key file cannot be read: {type(error).__name__}"
        raise BadConfig(
            why, hint="--backend-key-file FILE, with the key on its only line"
        ) from None
    if not key or not key.isprintable():
        raise BadConfig("the key file does not hold a key on its only line")
    return key


async def until_it_answers(engine: Engine, told: Callable[[BackendFailed], None]) -> None:
    """Ask again and again, ever more rarely; `told` hears of the first failure. Raises BadConfig
    where waiting will not help.
    """
    wait_s = 0.0
    while True:
        try:
            await engine.probe()
        except BackendFailed as error:
            if not wait_s:
                told(error)
            wait_s = next_wait(wait_s)
            await asyncio.sleep(wait_s)
        else:
            return
