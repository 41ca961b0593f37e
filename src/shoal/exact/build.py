"""Compiles the library in csrc/ with whatever C++ compiler this machine has.

``python -m shoal.exact.build`` builds it beside this file; `native` builds it into the user's cache
where that has not been done. Standard library only: the package's own build runs this file too.
"""

# The kernels are compiled once per variant, with that variant's flags; the processor is asked only
# when the library runs. No flag here may change the bits of a result (-ffast-math would).

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
COMMON = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-pthread",
    "-w",
)
COMPILERS = ("c++", "g++", "clang++")
TIMEOUT_S = 120.0

X86 = {
    "avx512vnni": [
        "-mavx2",
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"),
    ],
    "avxvnni": ["-mavx2", "-mavxvnni"],
    "avx2": ["-mavx2"],
    "sse41": ["-mssse3", "-msse4.1"],  # processors of 2008, and cheap ones until 2021
}
ARM = {"neondot": ["-march=armv8.2-a+dotprod"], "neon": list[str]()}
PLAIN = {"generic": ["-DSHOAL_PLAIN"]}


class BuildError(Exception):
    """No compiler, or it refused; the message is one line."""


def library_name() -> str:
    """The same for every Python: the library knows nothing of it."""
    return "libshoal.dylib" if sys.platform == "darwin" else "libshoal.so"


def compiler() -> list[str] | None:
    """$CXX if set, else the first one found; None without any."""
    if wish := os.environ.get("CXX"):
        return shlex.split(wish)
    return next(([path] for name in COMPILERS if (path := shutil.which(name))), None)


def variants(machine: str) -> dict[str, list[str]]:
    """Name -> flags of every variant for this kind of processor."""
    if machine.lower() in ("x86_64", "amd64"):
        return X86 | PLAIN
    return (ARM if machine.lower() in ("aarch64", "arm64") else {}) | PLAIN


def fingerprint() -> str:
    """Names the library that these sources and flags make; compiled into it."""
    digest = hashlib.sha256(repr((COMMON, X86, ARM, PLAIN)).encode())
    for path in sorted(SOURCES.glob("*")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def cache_name() -> str:
    """Changes with the fingerprint, the compiler, or the kind of processor."""
    about = (fingerprint(), compiler(), sys.platform, platform.machine())
    return hashlib.sha256(repr(about).encode()).hexdigest()[:16]


def build(target: Path, machine: str = "") -> Path:
    """Compile to `target`, replaced in one step; seconds. Raises BuildError."""
    command = compiler()
    if command is None:
        raise BuildError("no C++ compiler found (tried $CXX, c++, g++, clang++)")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as folder:
            made = _compile_all(command, Path(folder), variants(machine or platform.machine()))
            made.replace(target)
    except OSError as error:
        raise BuildError(f"cannot write {target}: {error}") from error
    return target


def _compile_all(command: list[str], folder: Path, flags: dict[str, list[str]]) -> Path:
    kernels = sorted(SOURCES.glob("*_kernels.cpp"))
    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:

        def compile_each(paths: list[Path], name: str, flags: list[str]) -> list[Future[Path]]:
            return [
                threads.submit(_object, [*command, *flags], path, folder / f"{name}_{path.stem}.o")
                for path in paths
            ]

        started = {
            name: compile_each(kernels, name, [*extra, f"-DSHOAL_VARIANT={name}"])
            for name, extra in flags.items()
        }
        made = {name: objects for name in started if (objects := _all_or_none(started[name]))}
        known = [f"-DSHOAL_HAS_{name}" for name in made]
        known.append(f'-DSHOAL_FINGERPRINT="{fingerprint()}"')
        others = sorted(set(SOURCES.glob("*.cpp")) - set(kernels))
        rest = [future.result() for future in compile_each(others, "all", known)]
    library = folder / library_name()
    objects = [path for group in made.values() for path in group] + rest
    _run([*command, "-shared", "-pthread", "-o", str(library), *map(str, objects)])
    return library


def _all_or_none(objects: list[Future[Path]]) -> list[Path] | None:
    """None where this compiler does not know a variant's flags: the library does without it."""
    try:
        return [future.result() for future in objects]
    except BuildError:
        return None


def _object(command: list[str], source: Path, made: Path) -> Path:
    _run([*command, *COMMON, "-c", str(source), "-o", str(made)])
    return made


def _run(command: list[str]) -> None:
    try:
        subprocess.run(  # noqa: S603 (the user's own compiler)
            command, check=True, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or "").strip().splitlines()
        first = next((line for line in lines if "error" in line), lines[0] if lines else "")
        raise BuildError(f"{command[0]} failed: {first}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} did not run: {error}") from error


def main() -> int:
    """Build beside this file; 1 and one line on the standard error where that fails."""
    try:
        sys.stdout.write(f"{build(Path(__file__).parent / library_name())}\n")
    except BuildError as error:
        sys.stderr.write(f"shoal's kernels were not built: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
