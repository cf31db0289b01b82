"""Disks that are full, files that change under a map, and what is not permitted."""

from __future__ import annotations

import os
import subprocess
from importlib.util import find_spec

import pytest

from support.index_jobs import posix, run_job

UNSHARE = ("unshare", "-m")


def mounts_of_its_own() -> bool:
    """Whether a process may have mounts that others do not see."""
    try:
        return subprocess.run([*UNSHARE, "true"], capture_output=True).returncode == 0
    except OSError:
        return False


own_mounts = pytest.mark.skipif(not mounts_of_its_own(), reason="may not mount a small disk")
root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may become another user"
)


@own_mounts
@pytest.mark.parametrize("place", ["saving", "building", "keeping", "finishing"])
def test_a_full_disk(tmp_path, place):
    run_job(tmp_path, f"full_while_{place}", launcher=UNSHARE)


@posix
def test_a_limit_on_the_size_of_files(tmp_path):
    run_job(tmp_path, "over_the_limit_of_a_file")


@posix
@pytest.mark.parametrize("change", ["cut off", "emptied", "written", "replaced", "removed"])
@pytest.mark.parametrize(
    "device",
    ["numpy", pytest.param("cpu", marks=pytest.mark.slow("a process each that imports torch"))],
)
def test_a_file_that_changes_while_it_is_mapped(tmp_path, change, device):
    if device == "cpu" and not find_spec("torch"):
        pytest.skip("torch is not installed")
    run_job(tmp_path, "changed_while_mapped", change, device)


@root
def test_what_is_not_permitted(tmp_path):
    run_job(tmp_path, "not_permitted")
