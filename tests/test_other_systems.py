"""The package on Windows and macOS, by shims: a child process without what Python lacks there."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import pytest

from support.paths import TESTS
from support.processes import run_python

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the shims are made for Linux")
SYSTEMS = ("windows", "macos")

USE = """
import sys
from support import shims
shims.apply(sys.argv[1])

import numpy as np
from click.testing import CliRunner
from gpusampler import PatchBatchSampler, PatchGroups
from gpusampler.cli.main import cli
from gpusampler.groups import index_build

index_build.CHECKPOINT_SECONDS = 0.0
ids = np.random.default_rng(0).permutation(np.repeat(np.arange(30), 100))
expected = [batch.indices.tolist() for batch in PatchBatchSampler(ids, 8, seed=0).batches(0)]
# What a killed process left is used.
open("a.partial", "wb").close()
groups = PatchGroups.from_ids(ids, path="a")
sampler = PatchBatchSampler(groups, 8, seed=0)
assert [batch.indices.tolist() for batch in sampler.batches(0)] == expected
other = PatchGroups.from_ids(ids[:500])
windows = sys.argv[1] == "windows"
try:
    other.save("a")
except PermissionError as error:
    assert windows, error
    assert "cannot replace a: " in str(error) and "load an index with mmap=False" in str(error)
    assert PatchGroups.load("a", ids, verify=True).num_samples == ids.size
else:
    assert not windows
    groups.save("a")
# The way round: nothing has mapped the file.
del groups, sampler
PatchGroups.load("a", mmap=False).save("a")
other.save("b")
import os
# On Windows filelock itself removes the lock file.
assert sorted({*os.listdir()} - {"a.lock"}) == ["a", "b"], os.listdir()

os.mkdir("folder")
for path, text in (("folder", "not a patch folder"), ("absent", "existing file or folder")):
    result = CliRunner().invoke(cli, ["inspect", path, "--batch-size", "8"])
    assert result.exit_code == 2 and text in result.stderr, (result.output, result.exception)
for use in (PatchGroups.load, other.save):
    try:
        use("folder")
    except IsADirectoryError:
        pass
    else:
        raise AssertionError

# A program that lies in the current folder must not be found.
with open("mf6", "w") as file:
    file.write("#!/bin/sh")
os.chmod("mf6", 0o755)
os.environ["PATH"] = "/usr/bin"
from groundwater_simulation.mf6 import find_mf6
try:
    find_mf6()
except FileNotFoundError:
    pass
else:
    raise AssertionError
"""

CALIBRATE = """
import sys, warnings
from support import shims
import torch
shims.apply(sys.argv[1])
from gpusampler import PatchBatchSampler, calibrate
import numpy as np

weight = torch.zeros(3)
sampler = PatchBatchSampler(np.repeat([0, 1], 50), 4, seed=0)
try:
    calibrate(lambda batch: None, sampler, state=[weight], cost={0: 1.0, 1: 2.0})
except RuntimeError as error:
    assert "only on Linux" in str(error), error
else:
    raise AssertionError
"""

RUN = """
import sys
import pytest
from support import shims

class Shims:
    # After pytest and its plugins are imported, and before tests are.
    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self):
        shims.apply(sys.argv[1])

sys.exit(pytest.main(sys.argv[2:], plugins=[Shims()]))
"""

CORE = (
    "groups/test_patch_groups",
    "groups/test_subsets",
    "groups/test_from_counts",
    "groups/test_index_format",
    "permutation/test_golden",
    "plan/test_coverage",
    "sampler/test_arguments",
    "sampler/test_batch_sampler",
    "sampler/test_state",
    "sampler/test_tensor_loader",
    "sources/test_files",
    "cli/test_cli",
)

# Tests that themselves need what is missing: they fork, replace posix_fallocate, or write over or
# remove an index that is mapped, which `test_files_and_folders` covers.
NEED_LINUX = (
    "test_a_filesystem_that_takes_no_room_beforehand",
    "test_workers_of_a_loader",
    "test_other_processes_read_the_same_file",
    "test_what_is_loaded_is_what_was_saved",
    "test_a_copy_does_not_need_the_files_name",
    "test_a_touched_file_is_compared_as_a_whole",
    "test_no_descriptor_and_no_map_outlives_the_groups",
)


@pytest.mark.parametrize("system", SYSTEMS)
def test_files_and_folders(tmp_path, system):
    run_python("-c", USE, system, cwd=tmp_path, timeout=120)


@pytest.mark.skipif(not find_spec("torch"), reason="torch is not installed")
@pytest.mark.parametrize("system", SYSTEMS)
def test_calibrate_says_what_it_needs(tmp_path, system):
    run_python("-c", CALIBRATE, system, cwd=tmp_path, timeout=120)


@pytest.mark.slow("the core tests once more, for each system")
@pytest.mark.parametrize("system", SYSTEMS)
def test_the_core_tests(tmp_path, system):
    files = [TESTS / f"{name}.py" for name in CORE]
    options = ["-q", "-n0", "-p", "no:cacheprovider", "--basetemp", tmp_path / "base"]
    options += ["-k", " and ".join(f"not {name}" for name in NEED_LINUX)]
    process = run_python("-c", RUN, system, *options, *files, timeout=900, check=False)
    assert process.returncode == 0, process.stdout[-8000:] + process.stderr[-2000:]
