"""The house itself: who may import whom, what importing costs, and what is documented."""

from __future__ import annotations

import ast
import doctest
import inspect
import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

import gpusampler

PACKAGE = Path(gpusampler.__file__).parent

# The rooms of DESIGN.md from the ground up: a room imports rooms of lower floors only.
FLOORS = [
    ["arrays", "permutation", "telemetry", "frameworks"],
    ["jit_runs"],
    ["jit"],
    ["validation", "streams", "lanes", "fingerprint", "idtable", "memory"],
    ["profiling", "children", "keeping", "fitting", "calibration_report"],
    ["ids", "runs", "steps"],
    ["sources", "counting", "signature", "checking"],
    ["sorting", "indexfile"],
    ["splitting", "building", "selecting"],
    ["grouping"],
    ["costs", "ranks", "resolving"],
    ["sizing", "mixing"],
    ["parts"],
    ["cutting"],
    ["tables"],
    ["kernels", "reference"],
    ["evaluation"],
    ["plan"],
    ["mixed_coverage", "state"],
    ["coverage"],
    ["iteration", "cursor"],
    ["sampler"],
    ["loader", "lightning", "probing"],
    ["searching"],
    ["calibration"],
    ["groundwater"],
    ["inspection"],
    ["__init__"],
    ["demo"],
    ["cli"],
    ["__main__"],
]
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}

# Imports for annotations only that may run up: none.
ONLY_FOR_TYPES: set[tuple[str, str]] = set()

NAMES_LIBRARIES = {
    "arrays",
    "memory",
    "ranks",
    "sources",
    "streams",
    "telemetry",
    "kernels",
    "cursor",
    "lightning",
    "groundwater",
    "demo",
    # Its generators and memory are torch's own.
    "children",
    "keeping",
    "probing",
    # Numba, for the one that imports it when it is worth it.
    "jit_runs",
}
HEAVY = {"numba", "torch", "cupy", "click", "matplotlib", "flopy", "gstools", "neuralop", "scipy"}
HEAVY |= {"pyarrow", "pandas", "polars", "zarr", "h5py", "datasets", "nvtx"}


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def is_for_types(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in (
        "TYPE_CHECKING",
        "typing.TYPE_CHECKING",
    )


def imports_of(tree: ast.AST, package: str) -> list[tuple[str, bool]]:
    """Every module that is imported, absolute, and whether only for annotations."""
    found = []

    def visit(node: ast.AST, for_types: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name, for_types) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    parts = package.split(".")[: len(package.split(".")) - child.level + 1]
                    base = ".".join([*parts, base]).rstrip(".")
                found.append((base, for_types))
                found.extend((f"{base}.{alias.name}", for_types) for alias in child.names)
            visit(child, for_types or is_for_types(child))

    visit(tree, False)
    return found


def package_of(path: Path) -> str:
    return ".".join(["gpusampler", *path.relative_to(PACKAGE).parts[:-1]])


def arrows() -> set[tuple[str, str, bool]]:
    """(room, room it imports, only for annotations), over the whole package."""
    found = set()
    for path in files():
        for name, for_types in imports_of(ast.parse(path.read_text()), package_of(path)):
            if name == "gpusampler":
                continue  # `from gpusampler import x` is counted by its x
            if name.startswith("gpusampler."):
                target = name.split(".")[1]
                # `from gpusampler import __version__` needs the whole of __init__.
                found.add((room_of(path), target if target in FLOOR else "__init__", for_types))
    return {arrow for arrow in found if arrow[0] != arrow[1]}


def test_every_room_is_in_the_design():
    assert {room_of(path) for path in files()} <= set(FLOOR)


def test_imports_run_down_only():
    found = arrows()
    assert ("sampler", "plan", False) in found
    assert ("plan", "lanes", False) in found
    up = {(a, b) for a, b, for_types in found if FLOOR[a] <= FLOOR[b] and not for_types}
    assert up == set()
    assert {(a, b) for a, b, for_types in found if FLOOR[a] <= FLOOR[b]} <= ONLY_FOR_TYPES


def test_the_arithmetic_knows_no_library():
    # Words in a comment or a docstring name nothing.
    naming = {}
    for path in files():
        if room_of(path) in NAMES_LIBRARIES:
            continue
        tree = ast.parse(path.read_text())
        named = {name.split(".")[0] for name, _ in imports_of(tree, package_of(path))}
        named |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        if named & {"torch", "cupy"}:
            naming[path.name] = named & {"torch", "cupy"}
    assert naming == {}


def in_a_new_process(code: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **variables},
    )
    return done.stdout


def test_importing_the_package_imports_nothing_heavy():
    loaded = in_a_new_process(
        "import sys, json; import gpusampler; print(json.dumps(sorted(sys.modules)))"
    )
    loaded = set(json.loads(loaded))
    assert "gpusampler.sampler" in loaded
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
    said = in_a_new_process(
        "import sys; sys.modules['torch'] = sys.modules['cupy'] = None\n"
        "import gpusampler\n"
        "assert sum(map(len, gpusampler.PatchBatchSampler([1, 1, 2], 2))) == 3\n"
        "for settings in ({'device': 'cpu'}, {'device': 'cupy'}, {'output': 'tensor'}):\n"
        "    try: gpusampler.PatchBatchSampler([1, 1, 2], 2, **settings)\n"
        "    except RuntimeError as error: print(error)\n"
    ).splitlines()
    assert len(said) == 3
    assert re.search("device .* torch is not installed, got 'cpu'.*gpusampler.torch", said[0])
    assert re.search("device .* cupy is not installed, got 'cupy'", said[1])
    # The argument that was given is the one that is named.
    assert re.search("output .* torch", said[2])


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
        or (isinstance(node, ast.Call) and re.search(r"checked_\w+$", ast.unparse(node.func)))
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


NEEDS = {"cuda_batches": "cupy", "triton_batches": "triton", "lightning": "lightning"}
NEEDS |= dict.fromkeys(["cursor", "dataset", "collate", "normalize"], "torch")
CORE = [path for path in files() if room_of(path) not in ("demo", "cli", "__main__")]


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_examples_of_every_docstring_run(path):
    if path.stem in NEEDS:
        pytest.importorskip(NEEDS[path.stem])
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    name = ".".join(part for part in parts if part != "__init__")
    if name == "gpusampler.calibration":
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
