"""The build hook: compiles the CPU kernels while hatchling builds a wheel. Never imported at run time.

A wheel with the kernels runs with any Python on one platform (py3-none-PLATFORM): they are plain C, called through
ctypes. Where they cannot be compiled the install succeeds all the same, as a wheel for any platform that carries the
reason. An editable install compiles beside the sources.

    LBC_KERNELS=require     no kernels, no install         LBC_KERNELS=off     nothing is compiled
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import platform_tags

HERE = Path(__file__).resolve().parent
SWITCH = "LBC_KERNELS"
OFF = f"{SWITCH}=off when lbc was installed"


class KernelsHook(BuildHookInterface):  # type: ignore[misc]
    """Puts the compiled kernels, or why there are none, into the wheel or beside the sources."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, before the wheel is written.

        Args:
            version: "editable", or hatchling's name for a normal wheel.
            build_data: hatchling's; what goes into the wheel, and its tag.

        Raises:
            ValueError: for an LBC_KERNELS that is none of its values.
            RuntimeError: if LBC_KERNELS=require and there are no kernels.
        """
        switch = os.environ.get(SWITCH) or "auto"
        if switch not in ("auto", "require", "off"):
            raise ValueError(f"{SWITCH} is 'require', 'off' or unset, not {switch!r}")
        if version == "editable":
            self._make(HERE, switch)
            return
        # Not a `with`: the files are read after this returns, and a build that fails never calls finalize.
        self._folder = tempfile.TemporaryDirectory(prefix="lbc-wheel-")
        folder = Path(self._folder.name)
        if self._make(folder, switch):
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{_platform()}"
        for made in folder.iterdir():
            build_data["force_include"][str(made)] = f"lbc_cli/runtime/native/{made.name}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was made for the wheel, after it was written."""
        if version != "editable":
            self._folder.cleanup()

    def _make(self, folder: Path, switch: str) -> bool:
        """Whether the kernels are in a folder now; a note says why they are not."""
        compiler = _load_compile()
        if switch == "off":
            compiler.leave_note(folder, OFF)
            return False
        outcome = compiler.compile_kernels(HERE, folder)
        if outcome.state == "built":
            return True
        if switch == "require":
            raise RuntimeError(f"{SWITCH}=require, and the CPU kernels were not built: {outcome.text}")
        self.app.display_warning(f"lbc is installed without its CPU kernels: {outcome.text}")
        return False


def _load_compile() -> ModuleType:
    """`compile.py` by its path: lbc is not installed yet, or another version of it is."""
    spec = importlib.util.spec_from_file_location("lbc_compile_kernels", HERE / "compile.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _platform() -> str:
    """The platform that the compiler made code for, as wheels spell it.

    On Linux the plain name: the tags before it promise that a wheel runs on other distributions too.
    """
    return next(tag for tag in platform_tags() if not tag.startswith(("manylinux", "musllinux")))
