"""The package as a whole: who may import whom, what importing costs, and what is documented."""

from __future__ import annotations

import ast
import doctest
import inspect
import json
import re
import shutil
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

import gpusampler
from support.paths import ROOT
from support.processes import run_python

PACKAGE = Path(gpusampler.__file__).parent

# Modules that may name torch or CuPy; the others ask `gpusampler.core`.
NAME_LIBRARIES = [
    "core/*",
    "sources/*",
    "groundwater/*",
    "demo/*",
    "lightning.py",
    "neuralop.py",
    "plan/evaluators/kernels/*",
    "sampler/cursor.py",
    "sampler/distributed.py",
    # Generators and memory are torch's own.
    "calibration/forked_child.py",
    "calibration/memory_meter.py",
    "calibration/snapshot.py",
]
HEAVY = {"torch", "cupy", "click", "matplotlib", "flopy", "gstools", "neuralop", "scipy"}
HEAVY |= {"pyarrow", "pandas", "polars", "zarr", "h5py", "datasets", "nvtx"}


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def lint_imports(folder: Path) -> str:
    """Return what import-linter finds, by the repository's contracts, of the package in a folder.

    Where the folder has no package, the installed one is checked.
    """
    shutil.copy(ROOT / "pyproject.toml", folder)
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    process = run_python("-c", code, "--no-cache", cwd=folder, check=False)
    assert process.returncode in (0, 1), process.stderr
    report = process.stdout
    assert (process.returncode == 0) == (" 0 broken" in report), report + process.stderr
    return report


def test_imports_run_down_only(tmp_path):
    pytest.importorskip("importlinter")
    report = lint_imports(tmp_path)
    assert " 0 broken" in report, report


@pytest.mark.parametrize(
    ("module", "line", "message"),
    [
        ("core/log.py", "from gpusampler import PatchGroups", "gpusampler.core.log -> "),
        (
            "groups/census.py",
            "from gpusampler.plan import coverage",
            "gpusampler.groups.census -> ",
        ),
        (
            "groundwater/reader.py",
            "from gpusampler.groups import subsets",
            "groundwater.reader -> ",
        ),
        ("calibration/search.py", "from gpusampler import groundwater", "calibration.search -> "),
        (
            "batching/costs.py",
            "from gpusampler.batching import tables",
            "allowed in gpusampler.batching",
        ),
    ],
)
def test_an_import_that_runs_up_is_found(tmp_path, module, line, message):
    pytest.importorskip("importlinter")
    ignored = shutil.ignore_patterns("__pycache__", "data")
    shutil.copytree(PACKAGE, tmp_path / "gpusampler", ignore=ignored)
    with (tmp_path / "gpusampler" / module).open("a") as file:
        # Lazy imports count, too.
        file.write(f"\n\ndef planted():\n    {line}\n")
    assert re.search(message, lint_imports(tmp_path))


def test_modules_live_in_wings():
    modules = {path.name for path in PACKAGE.glob("*.py")}
    assert modules == {"__init__.py", "__main__.py", "lightning.py", "neuralop.py"}


def test_the_arithmetic_knows_no_library():
    # Words in a comment or a docstring name nothing.
    naming = {}
    for path in files():
        module = path.relative_to(PACKAGE)
        if any(module.match(pattern) for pattern in NAME_LIBRARIES):
            continue
        nodes = list(ast.walk(ast.parse(path.read_text())))
        named = {node.id for node in nodes if isinstance(node, ast.Name)}
        for node in nodes:
            if isinstance(node, ast.Import):
                named |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                named.add(node.module.split(".")[0])
        if named & {"torch", "cupy"}:
            naming[str(module)] = named & {"torch", "cupy"}
    assert naming == {}


def in_a_new_process(code: str, **variables: str) -> str:
    return run_python("-c", code, **variables).stdout


def test_importing_the_package_imports_nothing_heavy():
    loaded = in_a_new_process(
        "import sys, json; import gpusampler; print(json.dumps(sorted(sys.modules)))"
    )
    loaded = set(json.loads(loaded))
    assert "gpusampler.sampler.batch_sampler" in loaded
    assert not loaded & HEAVY


def test_a_whole_epoch_on_numpy_imports_neither_torch_nor_cupy():
    in_a_new_process(
        "import sys, gpusampler, numpy as np\n"
        "sampler = gpusampler.PatchBatchSampler(np.arange(50) % 7, 3, output='numpy')\n"
        "assert sum(map(len, sampler)) == 50\n"
        "sampler.coverage(); sampler.load_state_dict(sampler.state_dict())\n"
        "list(sampler.batches()); repr(sampler)\n"
        "assert not {'torch', 'cupy'} & set(sys.modules)"
    )


def test_the_package_works_where_torch_is_not_installed():
    messages = in_a_new_process(
        "import sys; sys.modules['torch'] = sys.modules['cupy'] = None\n"
        "import gpusampler\n"
        "assert sum(map(len, gpusampler.PatchBatchSampler([1, 1, 2], 2))) == 3\n"
        "for settings in ({'device': 'cpu'}, {'device': 'cupy'}, {'output': 'tensor'}):\n"
        "    try: gpusampler.PatchBatchSampler([1, 1, 2], 2, **settings)\n"
        "    except RuntimeError as error: print(error)\n"
    ).splitlines()
    assert len(messages) == 3
    assert re.search("device='cpu' .* torch is not installed.*pip install torch", messages[0])
    assert re.search("device='cupy' .* cupy is not installed", messages[1])
    # The argument that was given is the one that is named.
    assert re.search("output='tensor' .* torch is not installed", messages[2])


@pytest.mark.serial("measures time")
def test_importing_takes_well_under_a_tenth_of_a_second_beyond_numpy(tmp_path):
    code = (
        "import numpy, time; start = time.process_time(); import gpusampler;"
        "print(time.process_time() - start)"
    )
    # As it is where it is installed: compiled once, whatever this process's own habits are.
    compiled = {"PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONDONTWRITEBYTECODE": ""}
    assert min(float(in_a_new_process(code, **compiled)) for _ in range(4)) < 0.1


def test_all_names_are_the_public_names():
    public = {
        name
        for name, value in vars(gpusampler).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert set(gpusampler.__all__) == public
    assert gpusampler.__all__ == sorted(gpusampler.__all__)
    assert 5 <= len(public) <= 12
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", gpusampler.__version__)


def test_annotations_are_shipped():
    assert (PACKAGE / "py.typed").exists()


def public_members():
    """Every public class and function, and their public methods: (name, object, docstring)."""
    for name in gpusampler.__all__:
        value = getattr(gpusampler, name)
        yield name, value
        if not inspect.isclass(value):
            continue
        for attribute, member in vars(value).items():
            if attribute.startswith("_"):
                continue
            if isinstance(member, (classmethod, staticmethod)):
                member = member.__func__
            if inspect.isfunction(member) or isinstance(member, property):
                yield f"{name}.{attribute}", member


MEMBERS = dict(public_members())


def sections_of(doc: str) -> set[str]:
    return set(re.findall(r"^([A-Z][A-Za-z ]+)\n-{3,}$", inspect.cleandoc(doc), re.M))


@pytest.mark.parametrize("name", MEMBERS)
def test_every_public_thing_is_documented(name):
    member = MEMBERS[name]
    doc = member.__doc__
    assert doc, name
    # NamedTuple and dataclass write one of their own, which is their signature.
    assert not doc.startswith(f"{name}(")
    summary = inspect.cleandoc(doc).splitlines()[0]
    assert summary.endswith("."), summary
    if inspect.isclass(member):
        assert sections_of(doc) & {"Parameters", "Attributes"}, name


def raises_something(function) -> bool:
    """Whether a function raises by itself or checks its arguments."""
    tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(function)))
    return any(
        isinstance(node, ast.Raise)
        or (isinstance(node, ast.Call) and re.search(r"check_\w+$", ast.unparse(node.func)))
        for node in ast.walk(tree)
    )


CHECKING = [
    name
    for name, member in MEMBERS.items()
    if (inspect.isfunction(member) and raises_something(member))
    or (inspect.isclass(member) and "__init__" in vars(member) and raises_something(member))
]


def test_who_checks_arguments_is_found():
    assert {"PatchBatchSampler", "PatchGroups.from_ids", "EpochPlan.evaluate"} <= set(CHECKING)


@pytest.mark.parametrize("name", CHECKING)
def test_what_is_raised_is_said(name):
    assert "Raises" in sections_of(MEMBERS[name].__doc__), name


@pytest.mark.parametrize("name", gpusampler.__all__)
def test_examples_are_there(name):
    if name == "GWPatchDataset":
        pytest.importorskip("torch")
    tests = doctest.DocTestFinder(recurse=False).find(getattr(gpusampler, name), name)
    assert sum(len(test.examples) for test in tests) > 0, "no example"


NEEDS = {"cuda_batches": "cupy", "triton_batches": "triton", "triton_op": "triton"}
NEEDS |= dict.fromkeys(["cursor", "dataset", "collate", "normalize"], "torch")
# Without a submodule, the folders of tests with these names would be found.
NEEDS |= {"lightning": "lightning.pytorch", "neuralop": "neuralop.training"}
NEEDS["plot"] = "matplotlib"
CORE = [
    path
    for path in files()
    if path.relative_to(PACKAGE).parts[0] not in ("demo", "cli", "__main__.py")
]


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_examples_of_every_docstring_run(path):
    if path.stem in NEEDS:
        pytest.importorskip(NEEDS[path.stem])
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    name = ".".join(part for part in parts if part != "__init__")
    if name == "gpusampler.calibration.calibrate":
        # It compares peaks of memory, which show where nothing was freed before.
        in_a_new_process(f"import doctest, {name} as m; assert doctest.testmod(m).failed == 0")
        return
    module = import_module(name)
    with np.printoptions(threshold=50):
        assert doctest.testmod(module).failed == 0


def test_a_sampler_leaves_no_thread_and_loads_no_bars():
    # A process that has threads should not fork, as DataLoaders make their workers by.
    code = (
        "import sys, threading, numpy, gpusampler;"
        "sys.stderr.isatty = lambda: True;"
        "list(gpusampler.PatchBatchSampler(numpy.arange(9999) % 7, 8));"
        "print(threading.active_count(), 'tqdm' in sys.modules)"
    )
    assert in_a_new_process(code) == "1 False\n"
