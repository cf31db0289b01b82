"""What is handed out: the version said alike everywhere, the licence in both forms, no more files
than belong there, and a table of supported versions that is what was found.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
import sysconfig
import tarfile
import zipfile
from email import message_from_string
from importlib import metadata
from pathlib import Path

import pytest

import gpusampler
from gpusampler.permutation import _native
from support.paths import ROOT
from support.processes import run_python

PACKAGE = ROOT / "gpusampler"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Of https://www.apache.org/licenses/LICENSE-2.0.txt.
APACHE = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
INSIDE = "dist-info/licenses/docs/LICENSE"
BINARY = (".so", ".pyd")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def versions_script():
    spec = importlib.util.spec_from_file_location("versions", ROOT / ".ci" / "versions.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_version_is_the_same_everywhere():
    version = gpusampler.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert metadata.version("gpusampler") == version
    cited = re.search(r"^version: (\S+)$", (ROOT / "docs/CITATION.cff").read_text(), re.MULTILINE)
    assert cited[1] == version
    heading = re.search(r"^## (.+)$", (ROOT / "docs/changelog.md").read_text(), re.MULTILINE)
    assert re.fullmatch(rf"{re.escape(version)} \((unreleased|\d{{4}}-\d\d-\d\d)\)", heading[1])


def test_the_command_says_the_version():
    pytest.importorskip("click")
    process = run_python("-m", "gpusampler", "--version")
    assert process.stdout == (
        f"gpusampler, version {gpusampler.__version__}, host evaluates in {_native.describe()}\n"
    )


def test_the_licence_is_apaches_to_the_letter():
    assert sha256((ROOT / "docs" / "LICENSE").read_bytes()) == APACHE
    package_metadata = metadata.metadata("gpusampler")
    assert package_metadata["License-Expression"] == "Apache-2.0"
    assert "license: Apache-2.0" in (ROOT / "docs/CITATION.cff").read_text().splitlines()


def test_extras_that_pages_name_are_there():
    provided = set(metadata.metadata("gpusampler").get_all("Provides-Extra"))
    asked = {
        (page.name, extra)
        for page in PAGES
        for found in re.findall(r"(?:gpusampler|[\"' ]\.)\[([a-z0-9, ]+)\]", page.read_text())
        for extra in found.split(",")
    }
    assert len(asked) >= 5
    assert {(page, extra) for page, extra in asked if extra.strip() not in provided} == set()


def test_the_table_of_versions_is_what_was_found():
    versions = versions_script()
    rows = json.loads(versions.RESULTS.read_text())
    text = versions.PAGE.read_text()
    assert text.split(versions.BEGIN)[1].split(versions.END)[0] == versions.table(rows)
    assert all(row["failed"] == 0 < row["passed"] for row in rows)
    tried = {re.match(r"\d+\.\d+", row["python"])[0] for row in rows}
    classifiers = metadata.metadata("gpusampler").get_all("Classifier")
    promised = re.findall(r":: Python :: (3\.\d+)", "\n".join(classifiers))
    assert set(promised) == tried
    assert metadata.metadata("gpusampler")["Requires-Python"] == ">=" + promised[0]


def test_the_core_that_versions_run_is_there():
    for name in versions_script().CORE:
        assert (ROOT / "tests" / f"{name}.py").is_file()


# The built forms


def built(folder: Path, out: Path, kind: str, **variables: str | None) -> Path:
    """Build the sdist or the wheel of a tree, with the hatchling that is installed."""
    run_python("-m", "hatchling", "build", "-t", kind, "-d", out, cwd=folder, **variables)
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def forms(tmp_path_factory) -> tuple[dict[str, bytes], dict[str, bytes], dict[str, bytes]]:
    """Files of the wheel, of the sdist, and of the wheel made of the sdist, by name."""
    pytest.importorskip("hatchling")
    if not PACKAGE.is_dir():
        pytest.skip("the package's source is not beside the tests")
    work = tmp_path_factory.mktemp("forms")
    wheel, sdist = (built(ROOT, work / kind, kind) for kind in ("wheel", "sdist"))
    with tarfile.open(sdist) as file:
        packed = {
            member.name.split("/", 1)[1]: file.extractfile(member).read()
            for member in file
            if member.isfile()
        }
    tree = work / "tree"
    for name, content in packed.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(content)
    again = built(tree, work / "again", "wheel")
    return files_of(wheel), packed, files_of(again)


def files_of(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist()}


def source_files(*folders: str) -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
        and not {"__pycache__", "results"} & {*path.parts}
        and path.suffix not in BINARY
    }


def test_the_wheel_holds_the_package_and_nothing_else(forms):
    wheel, _, _ = forms
    inside = {
        name for name in wheel if "dist-info/" not in name and Path(name).suffix not in BINARY
    }
    assert inside == source_files("gpusampler")
    for name in (
        "py.typed",
        "plan/evaluators/kernels/batches.cu",
        "permutation/_native/permutation.h",
        "demo/data/small/provenance.json",
    ):
        assert f"gpusampler/{name}" in inside
    info = {name.split("dist-info/")[1] for name in wheel if "dist-info/" in name}
    assert info == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/docs/LICENSE"}
    assert sum(map(len, wheel.values())) < 4e6


def test_the_wheel_names_its_licence_and_holds_it(forms):
    wheel, _, _ = forms
    (text,) = (content for name, content in wheel.items() if name.endswith("dist-info/METADATA"))
    wheel_metadata = message_from_string(text.decode())
    assert wheel_metadata["License-Expression"] == "Apache-2.0"
    assert wheel_metadata.get_all("License-File") == ["docs/LICENSE"]
    assert wheel_metadata["Description-Content-Type"] == "text/markdown"
    (licence,) = (content for name, content in wheel.items() if name.endswith(INSIDE))
    assert sha256(licence) == APACHE


def test_the_sdist_holds_what_tests_and_pages_need(forms):
    _, packed, _ = forms
    wanted = source_files("gpusampler", "tests", "benchmarks", "docs", ".ci", ".github")
    assert wanted <= packed.keys()
    assert {".mkdocs.yml", "README.md", "pyproject.toml", "PKG-INFO"} <= packed.keys()
    assert sha256(packed["docs/LICENSE"]) == APACHE


def test_a_wheel_made_of_the_sdist_is_the_same(forms):
    wheel, _, again = forms
    assert again == wheel


# The compiled module


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of what a wheel is built from."""
    pytest.importorskip("hatchling")
    pytest.importorskip("setuptools")
    if not PACKAGE.is_dir():
        pytest.skip("the package's source is not beside the tests")
    copy = tmp_path_factory.mktemp("tree")
    for name in ("gpusampler", ".ci"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    (copy / "docs").mkdir()
    for name in ("pyproject.toml", "README.md", "docs/LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def binaries(names) -> list[str]:
    return [name for name in names if Path(name).suffix in BINARY]


def wheel_info(wheel: Path) -> str:
    (info,) = (text for name, text in files_of(wheel).items() if name.endswith("dist-info/WHEEL"))
    return info.decode()


def test_the_tag_is_that_of_a_platform_where_it_was_compiled(tree, tmp_path):
    if sysconfig.get_config_var("Py_GIL_DISABLED") or shutil.which("cc") is None:
        pytest.skip("no C compiler, or no stable ABI")
    wheel = built(tree, tmp_path, "wheel", GPUSAMPLER_NATIVE="1")
    assert wheel.name.startswith(f"gpusampler-{gpusampler.__version__}-cp310-abi3-")
    assert "none-any" not in wheel.name
    assert len(binaries(files_of(wheel))) == 1
    assert "Root-Is-Purelib: false" in wheel_info(wheel)
    # It was not left in the source tree.
    assert binaries(path.name for path in (tree / "gpusampler").rglob("*")) == []


@pytest.mark.parametrize(
    "variables",
    [{"CC": "false"}, {"CC": "/no/such/compiler"}, {"GPUSAMPLER_NATIVE": "0"}],
    ids=["broken", "missing", "switched off"],
)
def test_without_a_compiler_the_wheel_is_pure(tree, tmp_path, variables):
    wheel = built(tree, tmp_path, "wheel", **{"GPUSAMPLER_NATIVE": None, **variables})
    assert wheel.name == f"gpusampler-{gpusampler.__version__}-py3-none-any.whl"
    assert binaries(files_of(wheel)) == []
    assert "Root-Is-Purelib: true" in wheel_info(wheel)


def test_an_installation_that_insists_needs_a_compiler(tree, tmp_path):
    arguments = "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path
    process = run_python(*arguments, cwd=tree, check=False, CC="false", GPUSAMPLER_NATIVE="1")
    assert process.returncode != 0
    assert list(tmp_path.iterdir()) == []


def test_an_editable_installation_leaves_no_stale_module(tree, tmp_path):
    """What an earlier one compiled goes, also where this one cannot compile."""
    pytest.importorskip("editables")
    folder = tree / "gpusampler" / "permutation" / "_native"
    stale = folder / "native.abi3.so"
    stale.write_bytes(b"stale")
    arguments = "-m", "hatchling", "build", "-t", "wheel:editable", "-d", tmp_path
    try:
        run_python(*arguments, cwd=tree, CC="false", GPUSAMPLER_NATIVE=None)
        assert not stale.exists()
        if shutil.which("cc") is not None:
            run_python(*arguments, cwd=tree, GPUSAMPLER_NATIVE="1")
            assert stale.read_bytes() != b"stale"
    finally:
        stale.unlink(missing_ok=True)
