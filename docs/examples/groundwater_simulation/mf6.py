"""Find the MODFLOW 6 program."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

ENV_VAR = "GPUSAMPLER_MF6"


def find_mf6(explicit: str | os.PathLike[str] | None = None) -> Path:
    """Find the MODFLOW 6 program: ``explicit``, else ``GPUSAMPLER_MF6``, else ``mf6`` on ``PATH``.

    A path that was given, as an argument or in the environment, is never passed over for another
    one: if it is no program, that is an error.

    Parameters
    ----------
    explicit : str or path-like, optional
        The program's path.

    Returns
    -------
    Path
        Absolute path of an executable file.

    Raises
    ------
    FileNotFoundError
        If the path given is no file, or no ``mf6`` was found.
    PermissionError
        If the path given is a file that may not be executed.
    """
    if explicit is not None:
        return _checked_program(Path(explicit), "mf6")
    if env_path := os.environ.get(ENV_VAR):
        return _checked_program(Path(env_path), ENV_VAR)
    if program := shutil.which("mf6"):
        return Path(program).absolute()
    raise FileNotFoundError(
        f"mf6, the MODFLOW 6 program, was not found: {ENV_VAR} is not set and PATH has no mf6. "
        "Put mf6 on PATH, or run `get-modflow :flopy` (it comes with flopy) and put the folder "
        "that it names on PATH; on x86-64 Linux, `python .ci/mf6.py` of the checkout downloads a "
        f"pinned build and prints its path, for {ENV_VAR}."
    )


def _checked_program(path: Path, name: str) -> Path:
    path = path.expanduser().absolute()
    if not path.is_file():
        raise FileNotFoundError(f"{name} must be the path of the MODFLOW 6 program, got {path}")
    if not os.access(path, os.X_OK):
        raise PermissionError(f"{name} must be an executable file, got {path} (chmod +x it)")
    return path
