"""Compiles the kernels when the package is built or installed. Never required: without a compiler
the package is the same in plain Python, several times slower.
"""

from __future__ import annotations

import runpy
import shutil
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = "shoal/exact"


class CustomBuildHook(BuildHookInterface[Any]):
    """For wheels; a source distribution carries csrc/ as it is. Editable installs get the library
    beside its sources.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        beside = Path(self.root, "src", FOLDER)
        module = runpy.run_path(str(beside / "build.py"))  # the package cannot be imported yet
        self.made = beside if version == "editable" else Path(tempfile.mkdtemp())
        library = self.made / module["library_name"]()
        try:
            module["build"](library)
        except module["BuildError"] as error:
            self.app.display_warning(f"shoal's kernels were not built: {error}")
            return
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"
        if version != "editable":
            build_data["force_include"][str(library)] = f"{FOLDER}/{library.name}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if self.target_name == "wheel" and version != "editable":
            shutil.rmtree(self.made, ignore_errors=True)
