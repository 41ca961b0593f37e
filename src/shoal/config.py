"""Settings and folders. Flag beats `SHOAL_*` variable beats `config.toml` beats default.

One name everywhere: setting `api_port`, variable `SHOAL_API_PORT`, `api_port = ...` in the file.
Only `cli/` and `node/` ask here; everything deeper takes arguments.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import msgspec

from .errors import BadConfig
from .units import QuantChoice

PREFIX = "SHOAL_"
HOME_VARIABLE = "SHOAL_HOME"

Origin = Literal["flag", "variable", "file", "default"]
Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Count = Annotated[int, msgspec.Meta(ge=0)]
Name = Annotated[str, msgspec.Meta(max_length=64)]  # as long as others read it

_AMOUNT = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\s*(%|[kmgt]i?b|[kmgt]|b)", re.IGNORECASE)
_EXPONENTS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


@dataclass(frozen=True, slots=True)
class Folders:
    """Where things are kept. Keys are `data`: an emptied cache must not change who we are."""

    data: Path
    config: Path
    cache: Path
    state: Path

    @classmethod
    def find(cls, env: Mapping[str, str]) -> Folders:
        """All below `SHOAL_HOME` when that is set, else where the operating system wants them."""
        if home := env.get(HOME_VARIABLE):
            root = Path(home).expanduser().absolute()
            return cls(data=root, config=root, cache=root / "cache", state=root / "state")
        from platformdirs import PlatformDirs

        places = PlatformDirs("shoal", appauthor=False)
        return cls(
            data=places.user_data_path,
            config=places.user_config_path,
            cache=places.user_cache_path,
            state=places.user_state_path,
        )

    @property
    def identity_file(self) -> Path:
        return self.data / "identity"

    @property
    def mesh_file(self) -> Path:
        """The secret of the private mesh that this node founded."""
        return self.data / "mesh"

    @property
    def relay_dir(self) -> Path:
        """What the embedded relay remembers between runs."""
        return self.data / "relay"

    @property
    def config_file(self) -> Path:
        return self.config / "config.toml"

    @property
    def capability_file(self) -> Path:
        """What the machine measured about itself."""
        return self.cache / "capability.json"

    @property
    def proofs_dir(self) -> Path:
        """Which architectures were proved to survive slicing, by library version."""
        return self.cache / "proofs"

    @property
    def scratch_dir(self) -> Path:
        """Files that are read once and gone."""
        return self.cache / "scratch"

    @property
    def runtime_file(self) -> Path:
        """JSON about the node that runs now: its pid and the address of its API."""
        return self.state / "node.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that a user may set. `origins` says where each value came from."""

    name: Name = ""  # shown to others; two words made from the node id when empty
    mesh: str = "shoal"  # the public mesh to join, unless a ticket says otherwise
    relays: tuple[str, ...] = ()  # ws:// or wss:// URLs; none = an embedded relay
    relay_keep: bool = False  # the embedded relay remembers between runs, on disk
    lan: bool = True  # find and be found on the local network
    listen_host: str = "0.0.0.0"  # noqa: S104  # other nodes connect here; every link proves its key
    listen_port: Port = 0  # 0 = any free port

    api_host: str = "127.0.0.1"
    api_port: Port = 7470
    api_key: str = field(default="", repr=False)

    model: str = ""  # hub id, folder or built-in name
    layers: str = ""  # START:STOP pins the slice by hand
    memory: str = "60%"  # of this machine's memory, or an amount such as 8GB
    dtype: Literal["", "f32", "bf16", "f16"] = ""  # "" = the checkpoint's own
    quant: QuantChoice = "auto"
    device: str = "auto"  # or cpu, cuda, cuda:N, mps
    draft: str = "ngram"  # who guesses tokens ahead: ngram, none, or a smaller model
    backend: str = field(default="", repr=False)  # URL of an engine that computes for us
    backend_key: str = field(default="", repr=False)  # that it wants; better in a file:
    backend_key_file: str = ""
    backend_model: str = ""  # what it calls the model
    backend_slots: Count = 0  # sessions at a time; 0 = as many as it says
    threads: Count = 0  # of the engine; 0 = one a core
    kv_tokens: Count = 16384  # room for so many tokens, all sessions together
    routing: Literal["auto", "latency", "throughput"] = "auto"  # what a route is chosen for
    leave_s: Count = 30  # what still runs here may take so long when the node leaves

    folders: Folders
    origins: Mapping[str, Origin] = field(default_factory=dict, compare=False)


@cache
def setting_types() -> dict[str, Any]:
    """Each setting's name and type, in the order in which they are shown."""
    hints = get_type_hints(Settings, include_extras=True)
    return {name: hint for name, hint in hints.items() if name not in ("folders", "origins")}


def load_settings(
    flags: Mapping[str, Any] | None = None,
    *,
    env: Mapping[str, str] | None = None,
    file: Path | None = None,
) -> Settings:
    """Join the four sources. A flag of None was not given; `env` is the process's own if None.

    Raises BadConfig, naming the source, for an unknown name or a value of the wrong kind.
    """
    env = os.environ if env is None else env
    folders = Folders.find(env)
    path = file or folders.config_file
    sources: list[tuple[Origin, str, Mapping[str, Any]]] = [
        ("file", str(path), read_file(path, required=file is not None)),
        ("variable", "the environment", read_variables(env)),
        ("flag", "the flags", {k: v for k, v in (flags or {}).items() if v is not None}),
    ]
    values: dict[str, Any] = {}
    origins: dict[str, Origin] = dict.fromkeys(setting_types(), "default")
    for origin, place, found in sources:
        for name, value in found.items():
            values[name] = checked(name, value, place)
            origins[name] = origin
    return Settings(**values, folders=folders, origins=origins)


def read_file(path: Path, *, required: bool) -> dict[str, Any]:
    """The file's settings, unchecked; nothing when there is no file and none is required."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not required:
            return {}
        raise BadConfig(f"there is no file {path}") from None
    except (OSError, ValueError) as error:  # ValueError: not TOML, or not text
        raise BadConfig(f"{path} cannot be read: {error}") from None


def read_variables(env: Mapping[str, str]) -> dict[str, str]:
    """The `SHOAL_*` variables that are settings, by setting."""
    found = {name: env.get(PREFIX + name.upper()) for name in setting_types()}
    return {name: value for name, value in found.items() if value is not None}


def unknown_variables(env: Mapping[str, str]) -> list[str]:
    """`SHOAL_*` variables that mean nothing here: most likely misspelt."""
    known = {PREFIX + name.upper() for name in setting_types()} | {HOME_VARIABLE}
    return sorted(name for name in env if name.startswith(PREFIX) and name not in known)


def checked(name: str, value: Any, place: str) -> Any:
    """`value` in the setting's type; text is read as a number, truth value or list with commas."""
    if name not in setting_types():
        near = get_close_matches(name, setting_types(), n=1)
        known = ", ".join(setting_types())
        hint = f"did you mean {near[0]}?" if near else f"known settings: {known}"
        raise BadConfig(f"{place}: there is no setting {name!r}", hint=hint)
    kind = setting_types()[name]
    if isinstance(value, str) and not value.isprintable():
        raise BadConfig(f"{place}: {name} holds control characters", hint="write it on one line")
    if name == "relays" and isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    try:
        return msgspec.convert(value, kind, strict=False)
    except msgspec.ValidationError as error:
        shown = "" if name == "api_key" else f" not {value!r}:"
        raise BadConfig(f"{place}: {name} cannot be{shown} {error}") from None


def parse_memory(text: str, total_bytes: int) -> int:
    """``60%`` of `total_bytes`, or an amount: ``8GB`` (10^9), ``8GiB`` (2^30). Raises BadConfig."""
    found = _AMOUNT.fullmatch(text.strip())
    if not found:
        raise BadConfig(f"{text!r} is not an amount of memory", hint="write 60%, 8GB or 500MB")
    unit = found[2].lower()
    base = 1024 if "i" in unit else 1000
    factor = total_bytes / 100 if unit == "%" else base ** _EXPONENTS[unit.rstrip("b").rstrip("i")]
    amount = int(float(found[1]) * factor)
    if not 0 < amount <= total_bytes:
        raise BadConfig(
            f"{text} of memory cannot be offered: this machine has {total_bytes / 1e9:.1f} GB",
            hint="offer between 1% and 100%, such as --memory 60%",
        )
    return amount
