"""Build hook of the wheel: compile the permutation in C if a C compiler is there.

Where that succeeds, the wheel has the compiled module and the tag of its platform, for all CPython
from 3.10 on. Otherwise it is pure Python, and NumPy evaluates batches. An editable install gets the
module in the source tree. The environment variable GPUSAMPLER_NATIVE decides as at run time: 0 does
not compile, 1 fails where that is impossible.
"""

from __future__ import annotations

import os
import platform
import re
import runpy
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = "gpusampler/permutation/_native"


class NativeBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Adds the compiled module to a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the module, and add it to what the wheel holds."""
        folder = Path(self.root, PACKAGE)
        setting = os.environ.get("GPUSAMPLER_NATIVE", "")
        self._temporary = tempfile.mkdtemp()
        try:
            if version == "editable":
                for old in find_binaries(folder):
                    old.unlink()
            if setting == "0":
                raise RuntimeError("GPUSAMPLER_NATIVE=0")
            check_python()
            binary = compile_module(folder, Path(self._temporary))
            if version == "editable":
                shutil.copy(binary, folder)
        except (Exception, SystemExit) as error:
            # Compilers fail in many ways; a wheel without the module works everywhere.
            if setting == "1":
                self.finalize(version, build_data, "")
                raise
            self.app.display_warning(
                "gpusampler is installed without its compiled module, and evaluates batches on the "
                f"host with NumPy, identically but slower. The reason: {error}"
            )
            return
        if version != "editable":
            build_data["force_include"][str(binary)] = f"{PACKAGE}/{binary.name}"
            build_data |= {"pure_python": False, "tag": f"cp310-abi3-{platform_tag()}"}

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove temporary files."""
        shutil.rmtree(self._temporary, ignore_errors=True)


def check_python() -> None:
    """Raise RuntimeError unless this Python can load modules of the stable ABI."""
    if platform.python_implementation() != "CPython":
        raise RuntimeError(f"{platform.python_implementation()} is not CPython")
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise RuntimeError("free-threaded Python has no stable ABI")


def platform_tag() -> str:
    """Return the platform of a wheel that this machine's compiler makes."""
    tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    if sys.platform != "darwin":
        return tag
    from hatchling.builders.macos import process_macos_plat_tag

    # "macosx_14_arm64" lacks the minor version, where the deployment target does.
    return process_macos_plat_tag(
        re.sub(r"^macosx_(\d+)_(?!\d)", r"macosx_\1_0_", tag), compat=False
    )


def find_binaries(folder: Path) -> list[Path]:
    """Return the compiled modules in a folder."""
    return [path for path in folder.glob("native.*") if path.suffix in (".so", ".pyd")]


def compile_module(folder: Path, build: Path) -> Path:
    """Compile the module with the compiler that setuptools finds, and return its path."""
    # The environment of a wheel that is not compiled may lack setuptools.
    from setuptools import Distribution, Extension
    from setuptools.command.build_ext import build_ext

    sources = runpy.run_path(str(folder / "sources.py"))
    options = ["/O2"] if os.name == "nt" else ["-O3", "-g0", "-fno-math-errno"]
    extension = Extension(
        sources["MODULE"],
        [str(folder / "native.c")],
        define_macros=[("SOURCE_HASH", f'"{sources["source_hash"]()}"')],
        extra_compile_args=options,
        py_limited_api=True,
    )
    command = build_ext(Distribution({"ext_modules": [extension]}))
    command.build_lib, command.build_temp = str(build), str(build)
    command.ensure_finalized()
    command.run()
    (binary,) = find_binaries(build)
    return binary
