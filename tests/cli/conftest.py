from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from shoal.cli.app import app

from .fake_node import FakeNode, serving


class Shoal:
    """Runs commands in this process, with a home of their own and colours asked for by nobody."""

    def __init__(self, home: Path, api: str) -> None:
        self.home = home
        self._api = api

    def __call__(self, *arguments: str, asks: bool = True, stdin: str | None = None) -> Result:
        """`asks` adds --api with the fake node's address."""
        where = ["--api", self._api] if asks else []
        return CliRunner(env={"SHOAL_HOME": str(self.home)}).invoke(
            app, [*arguments, *where], input=stdin, prog_name="shoal"
        )


@pytest.fixture(autouse=True)
def no_settings_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SHOAL_API_KEY", "SHOAL_DEBUG", "SHOAL_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def fake_node() -> Iterator[FakeNode]:
    with serving(FakeNode()) as fake:
        yield fake


@pytest.fixture
def shoal(tmp_path: Path, fake_node: FakeNode) -> Shoal:
    return Shoal(tmp_path / "home", fake_node.url)
