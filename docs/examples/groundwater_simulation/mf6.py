"""Find the MODFLOW 6 program."""

from __future__ import annotations

import os
from pathlib import Path

ENV_VAR = "GPUSAMPLER_MF6"


def find_mf6(explicit: str | os.PathLike[str] | None = None) -> Path:
    """Find the MODFLOW 6 program: ``explicit``, else ``GPUSAMPLER_MF6``, else ``mf6`` on ``PATH``.

    Folders of ``PATH`` that are not absolute are skipped, and so is the current folder.
    There is no fallback for a path given as the argument or in the environment: if it is not a
    program, that is an error.

    Parameters
    ----------
    explicit : str or path-like, optional
        Path of the program.

    Returns
    -------
    Path
        Absolute path of an executable file.

    Raises
    ------
    FileNotFoundError
        If the given path is not a file, or no ``mf6`` was found.
    PermissionError
        If the given path is not executable.
    """
    if explicit is not None:
        return _checked_program(Path(explicit), "mf6")
    if env_path := os.environ.get(ENV_VAR):
        return _checked_program(Path(env_path), ENV_VAR)
    # Not shutil.which, which also looks in the current folder on Windows: a program that lies
    # beside downloaded data must not run. For the same reason relative folders are skipped.
    for folder in filter(os.path.isabs, os.get_exec_path()):
        for name in ("mf6", "mf6.exe"):
            program = Path(folder, name)
            if program.is_file() and os.access(program, os.X_OK):
                return program
    raise FileNotFoundError(
        f"mf6, the MODFLOW 6 program, was not found: {ENV_VAR} is not set and PATH has no mf6. "
        "Run `get-modflow :flopy`, a command of flopy, and add the folder that it prints to PATH. "
        "On x86-64 Linux, `python .ci/mf6.py` in the checkout downloads a pinned build and prints "
        f"its path: set {ENV_VAR} to it."
    )


def _checked_program(path: Path, name: str) -> Path:
    path = path.expanduser().absolute()
    if not path.is_file():
        raise FileNotFoundError(f"{name} must be the path of the MODFLOW 6 program, got {path}")
    if not os.access(path, os.X_OK):
        raise PermissionError(f"{name} must be an executable file, got {path}; run chmod +x on it")
    return path
