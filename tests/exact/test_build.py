"""Finding, compiling and doing without the library."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shoal.exact import build, native

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no compiler here")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """`load` looks at nothing but an empty cache folder."""
    native.load.cache_clear()
    monkeypatch.setattr(native, "BESIDE", tmp_path / "nowhere")
    monkeypatch.setattr("platformdirs.user_cache_path", lambda _: tmp_path)
    monkeypatch.setattr(build, "variants", lambda _: build.PLAIN)  # a quarter of the time
    monkeypatch.delenv("SHOAL_KERNELS", raising=False)
    return tmp_path


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    native.load.cache_clear()


def libraries(folder: Path) -> list[Path]:
    return list(folder.rglob(build.library_name()))


def test_kernels_off_means_no_library(monkeypatch: pytest.MonkeyPatch, fresh: Path) -> None:
    monkeypatch.setenv("SHOAL_KERNELS", "off")
    assert native.load() is None
    assert not libraries(fresh)


@needs_compiler
def test_a_missing_library_is_compiled_once(monkeypatch: pytest.MonkeyPatch, fresh: Path) -> None:
    assert native.load() is not None
    (library,) = libraries(fresh)
    assert os.listdir(library.parent) == [library.name]
    native.load.cache_clear()
    monkeypatch.setattr(build, "build", lambda _: pytest.fail("compiled again"))
    assert native.load() is not None


def test_a_failed_build_is_told_once_and_remembered(
    monkeypatch: pytest.MonkeyPatch, fresh: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "false")
    assert native.load() is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    native.load.cache_clear()
    monkeypatch.setattr(build, "build", lambda _: pytest.fail("tried again"))
    assert native.load() is None
    assert len(caplog.records) == 1


def test_without_any_compiler_there_is_no_library(
    monkeypatch: pytest.MonkeyPatch, fresh: Path
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(fresh))
    assert build.compiler() is None
    assert native.load() is None


def test_without_the_sources_there_is_no_library(
    monkeypatch: pytest.MonkeyPatch, fresh: Path
) -> None:
    monkeypatch.setattr(build, "SOURCES", fresh / "stripped")
    assert native.load() is None


def test_a_file_that_is_no_library_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, fresh: Path
) -> None:
    broken = fresh / "broken.so"
    broken.write_bytes(b"\x7fELF nothing")
    monkeypatch.setattr(native, "BESIDE", broken)
    monkeypatch.setenv("CXX", "false")
    assert native.load() is None


@needs_compiler
def test_a_library_of_other_sources_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(build, "variants", lambda _: build.PLAIN)
    library = build.build(tmp_path / build.library_name())
    monkeypatch.setattr(build, "fingerprint", lambda: "another")
    assert native.opened(library) is None


def test_the_fingerprint_changes_with_a_source(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for path in build.SOURCES.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = build.fingerprint()
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    assert build.fingerprint() == before
    (tmp_path / "pool.h").write_text("// other")
    assert build.fingerprint() != before


@needs_compiler
def test_a_variant_that_the_compiler_does_not_know_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(build, "variants", lambda _: {"avx2": ["--no-such-flag"]} | build.PLAIN)
    built = native.opened(build.build(tmp_path / build.library_name()))
    assert built is not None
    assert built.isa == "generic"


@needs_compiler
@pytest.mark.parametrize("isa", ["generic", "no-such-thing"])
def test_a_variant_can_be_forced_and_a_wrong_name_does_no_harm(isa: str) -> None:
    code = "from shoal.exact import native; print(native.load().isa)"
    environment = os.environ | {"SHOAL_ISA": isa}
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert (out.stdout.strip() == "generic") is (isa == "generic")


@needs_compiler
def test_many_threads_may_call_at_once_and_a_forked_child_computes() -> None:
    kernels = native.load()
    assert kernels is not None
    before = kernels.threads
    kernels.set_threads(3)
    codes = torch.randint(-127, 128, (700, 300), dtype=torch.int8)
    linear, x = kernels.linear8(codes, torch.ones(700)), torch.randn(9, 300)
    expected, wrong = linear(x), list[int]()

    def call() -> None:
        wrong.extend(i for i in range(50) if not torch.equal(linear(x), expected))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(linear(x), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
    kernels.set_threads(before)
