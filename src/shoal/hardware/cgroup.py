"""The memory limit of a Linux container or service: control groups, versions 1 and 2."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .probe import attempt


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    limit_bytes: int
    used_bytes: int  # without file pages, which give way

    @property
    def free_bytes(self) -> int:
        return max(0, self.limit_bytes - self.used_bytes)


@dataclass(frozen=True, slots=True)
class _Version:
    """How one version of control groups names things."""

    mount: str
    limit: str
    usage: str
    file_pages: str


UNLIMITED = 1 << 53  # version 1 writes no limit as the largest number of whole pages
V1 = _Version(
    "sys/fs/cgroup/memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    "total_inactive_file",
)
V2 = _Version("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")


def memory_limits(root: Path) -> list[MemoryLimit]:
    """Every limit on this process; several when groups are nested. Unreadable ones are left out."""
    found = [attempt(partial(_read, folder, version), None) for version, folder in _folders(root)]
    return [limit for limit in found if limit is not None]


def _folders(root: Path) -> Iterator[tuple[_Version, Path]]:
    """Our groups and all that they are part of. In a container the path may not be visible: then
    the mount itself is our group."""
    lines = attempt((root / "proc/self/cgroup").read_text, "").splitlines()
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        version = V1 if controllers else V2
        mount = root / version.mount
        folder = mount / path.strip("/")
        for group in (folder, *folder.parents):
            if group.is_relative_to(mount) and ".." not in group.parts:
                yield version, group


def _read(folder: Path, version: _Version) -> MemoryLimit | None:
    written = (folder / version.limit).read_text().strip()
    if written == "max" or int(written) >= UNLIMITED:
        return None
    used = attempt(lambda: int((folder / version.usage).read_text()), 0)
    pages = attempt(lambda: _file_pages(folder, version), 0)
    return MemoryLimit(int(written), max(0, used - pages))


def _file_pages(folder: Path, version: _Version) -> int:
    lines = (folder / "memory.stat").read_text().splitlines()
    return int(dict(line.split(maxsplit=1) for line in lines)[version.file_pages])
