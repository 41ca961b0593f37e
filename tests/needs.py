"""What a test needs beside the project. In CI it must be there; elsewhere its absence is a skip."""

from __future__ import annotations

import importlib.util
import os

import pytest


def needs(*modules: str) -> None:
    """Skip the test, with the reason, when one of these cannot be imported; in CI, fail."""
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    if not absent:
        return
    why = f"not installed: {', '.join(absent)}"
    if os.environ.get("CI"):
        pytest.fail(why)
    pytest.skip(why)
