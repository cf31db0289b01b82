"""Random tables under the address and the undefined-behaviour sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

import gpusampler
from gpusampler.permutation._native.sources import FOLDER, source_hash
from support.processes import environment, run_fuzzer, run_python

FLAGS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

SPOILT = {
    "group": ("if (g < 0 || g >= job->num_groups) return 0;", ""),
    "room for a batch": ("if (rows.size[k] > capacity - done.samples - samples) break;", ""),
    "room for a row": ("size[at] < 0 ||\n                size[at] > capacity - samples", "0"),
    "position": ("wrong |= tile[k] < 0 || tile[k] >= n;", ""),
    "place": ("if (at < 0 || at >= ends[g] || at >= order_size) return i;", ""),
    "group of a sample": ("if (g >= (u64)num_groups) return i;", ""),
    "order": ("const int is_beyond = position >= (u64)order_size;", "const int is_beyond = 0;"),
    "block": ("if (low < 0 || high >= blocks->order.size) return -1;", ""),
    "product": ("j < 0 || j >= n || ", ""),
}
"""Checks without which a wrong table leads outside an array, or to undefined behaviour."""


@pytest.fixture(scope="module")
def gcc() -> tuple[str, str]:
    """The compiler, and the libraries that a process with sanitizers loads first."""
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("no gcc")
    libraries = []
    for name in ("libasan.so", "libubsan.so"):
        command = [gcc, f"-print-file-name={name}"]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if not Path(found).is_absolute():
            pytest.skip(f"no {name}")
        libraries.append(found)
    return gcc, " ".join(libraries)


def compile_module(gcc: tuple[str, str], source: str, module: Path) -> dict[str, str]:
    """Compile a source with sanitizers; return the environment in which it is loaded."""
    path = module.with_suffix(".c")
    path.write_text(source)
    include = [f"-I{FOLDER}", f"-I{sysconfig.get_paths()['include']}"]
    options = ["-shared", "-fPIC", f'-DSOURCE_HASH="{source_hash()}"', *include, "-lm"]
    subprocess.run([gcc[0], *FLAGS, str(path), "-o", str(module), *options], check=True)
    return {
        "LD_PRELOAD": gcc[1],
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONMALLOC": "malloc",
    }


def fuzz(gcc: tuple[str, str], folder: Path, source: str, seconds: int):
    """Call a source, compiled with sanitizers, with random tables."""
    variables = compile_module(gcc, source, folder / "native.so")
    return run_python("-m", "support.fuzz_native", folder, seconds, 1, check=False, **variables)


def fuzz_package(gcc: tuple[str, str], folder: Path, source: str, *fuzzer: object) -> None:
    """Run a fuzzer on a copy of the package whose compiled module has sanitizers."""
    package = Path(gpusampler.__file__).parent
    shutil.copytree(package, folder / "gpusampler", ignore=shutil.ignore_patterns("*.so"))
    module = folder / "gpusampler" / FOLDER.relative_to(package) / "native.abi3.so"
    variables = compile_module(gcc, source, module)
    variables["PYTHONPATH"] = f"{folder}{os.pathsep}{environment()['PYTHONPATH']}"
    run_fuzzer(*fuzzer, GPUSAMPLER_NATIVE="1", **variables)


@pytest.mark.slow("a minute of mutated inputs")
@pytest.mark.parametrize("fuzzer", [("fuzz_files", "index", 2000, 5), ("fuzz_states", 4000, 5)])
def test_no_file_or_state_leads_outside_an_array(gcc, tmp_path, fuzzer):
    fuzz_package(gcc, tmp_path, (FOLDER / "native.c").read_text(), *fuzzer)


@pytest.mark.slow("a copy of the package is compiled")
def test_a_write_outside_an_array_is_found(gcc, tmp_path):
    right, wrong = "blocks->is_verified[block] = 1;", "blocks->is_verified[block + 9] = 1;"
    source = (FOLDER / "native.c").read_text()
    assert source.count(right) == 1
    with pytest.raises(AssertionError, match="AddressSanitizer: heap-buffer-overflow"):
        fuzz_package(gcc, tmp_path, source.replace(right, wrong), "fuzz_files", "index", 20, 5)


@pytest.mark.slow("half a minute of random calls")
def test_no_table_leads_outside_an_array(gcc, tmp_path):
    process = fuzz(gcc, tmp_path, (FOLDER / "native.c").read_text(), 25)
    assert process.returncode == 0, process.stderr
    calls = {name: tuple(map(int, numbers)) for name, *numbers in
             map(str.split, process.stdout.splitlines())}  # fmt: skip
    assert set(calls) == {"evaluate", "ranges", "permute", "keys", "look_up", "place", "verify"}
    assert min(done for done, _ in calls.values()) > 50
    assert all(refused > 50 for name, (_, refused) in calls.items() if name != "keys")


@pytest.mark.slow("each spoilt source is compiled")
@pytest.mark.parametrize("check", SPOILT)
def test_without_a_check_one_does(gcc, tmp_path, check):
    source = (FOLDER / "native.c").read_text()
    assert source.count(SPOILT[check][0]) == 1
    process = fuzz(gcc, tmp_path, source.replace(*SPOILT[check]), 20)
    assert process.returncode != 0
    assert "Sanitizer" in process.stderr or "runtime error" in process.stderr
