"""The form that Numba compiles: the same batches, turned to once it is worth it."""

from __future__ import annotations

import re
import sys
import tracemalloc
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusampler import PatchBatchSampler, PatchGroups
from gpusampler.permutation import numpy_impl, position_ranges
from gpusampler.permutation.numba import jit
from gpusampler.permutation.reference import grid_of, grids_of
from support.paths import TESTS
from support.processes import run_python

pytest.importorskip("numba", reason="Numba is not installed")

EDGES = [1, 2, 3, 31, 32, 33, 37, 127, 128, 129, 1023, 1024, 1025, 65535, 65536, 65537, 2**31 - 1]


@pytest.fixture(scope="module")
def form() -> ModuleType:
    return jit.Compiled("1").form(1)


def using(monkeypatch: pytest.MonkeyPatch, setting: str, **options: str) -> jit.Compiled:
    """Let this process decide anew."""
    compiled = jit.Compiled(setting, **options)
    monkeypatch.setattr(jit, "compiled_form", compiled.form)
    return compiled


def rows_of(samples, starts, lengths):
    return [samples[a : a + n].tolist() for a, n in zip(starts, lengths, strict=True)]


def permuted(first, lengths, n, key, base, order):
    grid = grids_of(np, n)
    samples, starts = position_ranges.permute_ranges(first, lengths, n, key, grid, base, order)
    assert samples.dtype == np.int64
    assert samples.size == lengths.sum()
    return rows_of(samples, starts, lengths)


@st.composite
def runs_of_positions(draw):
    sizes = st.one_of(st.sampled_from(EDGES), st.integers(1, 3000), st.integers(1, 2**31 - 1))
    n = np.array(draw(st.lists(sizes, min_size=1, max_size=12)), np.int64)
    first = np.array([draw(st.integers(0, int(2 * m))) for m in n], np.int64)
    lengths = st.one_of(st.integers(0, 70), st.integers(500, 530), st.integers(0, 40_000))
    lengths = np.array([draw(lengths) for _ in n], np.int64)
    words = st.one_of(st.sampled_from([0, 1, 2**31, 2**32 - 1]), st.integers(0, 2**32 - 1))
    key = tuple(np.array([draw(words) for _ in n], np.int64) for _ in range(2))
    base = np.array([draw(st.integers(0, 2**40)) for _ in n], np.int64)
    return first, lengths, n, draw(st.sampled_from([key, None])), base


@given(runs_of_positions())
def test_runs_are_those_of_numpy(given):
    with pytest.MonkeyPatch.context() as patch:
        using(patch, "0")
        expected = permuted(*given, None)
        using(patch, "1")
        assert permuted(*given, None) == expected


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("mapped", [False, True], ids=["in memory", "read-only"])
def test_samples_are_looked_up_in_any_order(monkeypatch, dtype, mapped):
    rng = np.random.default_rng(3)
    counts = np.array([5, 40, 2000, 70_000], np.int64)
    order = rng.permutation(counts.sum()).astype(dtype)
    order.flags.writeable = not mapped
    starts = np.cumsum(counts) - counts
    patch = rng.integers(0, 4, 300)
    lengths = rng.integers(1, 400, 300)
    key = tuple(rng.integers(0, 2**32, 300) for _ in range(2))
    arguments = (rng.integers(0, counts[patch]), lengths, counts[patch], key, starts[patch], order)
    using(monkeypatch, "0")
    expected = permuted(*arguments)
    using(monkeypatch, "1")
    assert permuted(*arguments) == expected


@pytest.mark.parametrize("n", [*EDGES, 2**32 - 1, 2**32])
def test_positions_of_one_permutation_are_those_of_numpy(monkeypatch, n):
    x = np.unique(np.r_[np.linspace(0, n - 1, 700).astype(np.int64), 0, n - 1])
    key = (2**32 - 1, 2**31 + 5)
    using(monkeypatch, "0")
    expected = numpy_impl.permute_one(x, n, key, grid_of(n))
    using(monkeypatch, "1")
    assert numpy_impl.permute_one(x, n, key, grid_of(n)).tolist() == expected.tolist()
    assert numpy_impl.permute_one(x[:0], n, key, grid_of(n)).size == 0


def test_positions_of_one_permutation_take_no_memory_but_for_the_result(monkeypatch, form):
    n = 300_000
    x = np.arange(n)
    using(monkeypatch, "0")
    expected = numpy_impl.permute_one(x, n, (1, 2), grid_of(n))
    using(monkeypatch, "1")
    tracemalloc.start()
    try:
        result = numpy_impl.permute_one(x, n, (1, 2), grid_of(n))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * x.nbytes
    assert np.array_equal(result, expected)


def test_a_split_has_the_same_parts(monkeypatch):
    groups = PatchGroups.from_counts([3, 50, 1500, 70_000])
    splits = []
    for setting in ("0", "1"):
        using(monkeypatch, setting)
        for by in ("sample", "patch"):
            splits.append([part.order for part in groups.split([0.5, 0.5], by=by, seed=3)])
            splits[-1] = [None if order is None else order.tolist() for order in splits[-1]]
    assert splits[:2] == splits[2:]


def epoch_of(output="list"):
    ids = np.random.default_rng(0).integers(0, 40, 20_000)
    return PatchBatchSampler(ids, 16, seed=5, output=output)


@pytest.mark.parametrize("output", ["list", "numpy", "tensor"])
def test_a_process_turns_to_it_in_the_middle_of_an_epoch(monkeypatch, output):
    if output == "tensor":
        pytest.importorskip("torch")
    using(monkeypatch, "0")
    expected = [list(map(int, batch)) for batch in epoch_of(output)]
    monkeypatch.setattr(jit, "WORTH", 9000)
    compiled = using(monkeypatch, "")
    batches, forms = [], []
    for batch in epoch_of(output):
        forms.append(compiled.form(0) is not None)
        batches.append(list(map(int, batch)))
    assert batches == expected
    assert not forms[0]
    assert forms[-1]
    assert forms == sorted(forms)


def test_little_work_does_not_import_numba():
    code = (
        "import sys; from gpusampler import PatchBatchSampler\n"
        "for epoch in range(3): list(PatchBatchSampler([i % 7 for i in range(5000)], 8, seed=0))\n"
        "assert 'numba' not in sys.modules"
    )
    run_python("-c", code, **{jit.VARIABLE: ""})


def test_never_means_never(monkeypatch):
    monkeypatch.setattr(jit, "WORTH", 0)
    assert jit.Compiled("0").form(10**9) is None


def test_at_once_needs_numba(monkeypatch):
    monkeypatch.setattr(jit, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"GPUSAMPLER_COMPILED=1 .*'gpusampler\[numba\]"):
        jit.Compiled("1").form(1)
    monkeypatch.setattr(jit, "WORTH", 0)
    compiled = jit.Compiled("")
    # Who did not ask for it is told nothing.
    assert compiled.form(1) is None
    assert compiled.form(1) is None


def test_a_form_that_is_wrong_is_not_used(monkeypatch, form):
    def off_by_one(out, *arguments):
        form.runs(out, *arguments)
        out[-1] += 1

    monkeypatch.setitem(sys.modules, "wrong_runs", SimpleNamespace(runs=off_by_one))
    using(monkeypatch, "0")
    expected = list(PatchBatchSampler([1, 1, 2, 2, 2], 2, seed=0))
    compiled = using(monkeypatch, "1", module="wrong_runs")
    with pytest.warns(UserWarning, match="NumPy evaluates .* differ from the reference") as warned:
        result = list(PatchBatchSampler([1, 1, 2, 2, 2], 2, seed=0))
    assert len(warned) == 1
    assert compiled.form(1) is None
    assert result == expected


compiles_again = pytest.mark.slow("compiles everything again")


@pytest.mark.parametrize(
    "constant",
    [
        "SPREAD",
        *(
            pytest.param(name, marks=compiles_again)
            for name in ("MIX_1", "COIN_ROUND", "MAX_ROUNDS")
        ),
    ],
)
def test_every_constant_is_looked_at(constant):
    """What a cache of Numba's holds from other constants is found out; here uncompiled."""
    code = (
        "import sys, warnings\n"
        "import gpusampler.permutation.reference as p\n"
        f"true = p.{constant}; p.{constant} = true + int(sys.argv[1])\n"
        "from gpusampler.permutation.numba import jit, jit_runs\n"
        f"p.{constant} = true\n"
        "warnings.simplefilter('ignore', RuntimeWarning)  # numbers that wrap\n"
        "warnings.simplefilter('error', UserWarning)\n"
        "try: print(jit.Compiled('1').form(1).__name__)\n"
        "except UserWarning as said: print(said)\n"
    )

    def printed(change: int) -> str:
        return run_python("-c", code, change, NUMBA_DISABLE_JIT="1").stdout

    assert printed(0) == "gpusampler.permutation.numba.jit_runs\n"
    assert "differ from the reference" in printed(-2)


@pytest.mark.parametrize("way", ["_permute_run", "_permute_tile", "_small_images"])
def test_every_way_through_it_is_looked_at(way):
    """Of long runs, short ones and small patches; here uncompiled, so that one can be taken out."""
    code = (
        "import sys, warnings; warnings.simplefilter('ignore')\n"
        "from gpusampler.permutation.numba import jit, jit_runs\n"
        "jit._check(jit_runs)\n"
        "setattr(jit_runs, sys.argv[1], lambda *given: None)\n"
        "try: jit._check(jit_runs)\n"
        "except RuntimeError as said: print(said)\n"
    )
    process = run_python("-c", code, way, NUMBA_DISABLE_JIT="1")
    assert "differ from the reference" in process.stdout, process.stderr


def test_a_compiler_that_fails_leaves_numpy(monkeypatch):
    using(monkeypatch, "1", module="gpusampler.no_such_module")
    with pytest.warns(UserWarning, match="NumPy evaluates .*ModuleNotFoundError"):
        assert sum(map(len, PatchBatchSampler([1, 1, 2], 2))) == 3


def test_a_compiler_that_is_switched_off_is_not_used():
    """Whose own functions are to run uncompiled gets no batches of plain Python."""
    code = (
        "from gpusampler import PatchBatchSampler\n"
        "from gpusampler.permutation.numba import jit\n"
        "jit.WORTH = 0\n"
        "list(PatchBatchSampler([1, 1, 2], 2))\n"
        "print(jit.compiled_form(0))\n"
    )
    variables = {jit.VARIABLE: "", "NUMBA_DISABLE_JIT": "1"}
    assert run_python("-W", "error", "-c", code, **variables).stdout == "None\n"


@pytest.mark.slow("a process of its own compiles everything")
def test_without_a_folder_for_a_cache_it_compiles_all_the_same():
    code = (
        "from numba.core import caching\n"
        "caching.CacheImpl._locator_classes = []\n"
        "from gpusampler.permutation.numba import jit\n"
        "assert jit.Compiled('1').form(1) is not None\n"
    )
    run_python("-c", code)


FILES = [
    "permutation/test_golden",
    "plan/test_epoch_plan",
    "sampler/test_batch_sampler",
    "plan/test_cost_bins_plan",
    "plan/test_huge",
    "groups/test_subsets",
]
OTHERS = "not torch and not compile and not kernel"


@pytest.mark.slow("six files of tests once more, compiled by Numba")
def test_what_numpy_is_tested_for():
    """Whole files of tests, on the compiled form."""
    files = [TESTS / f"{name}.py" for name in FILES]
    options = ["-q", "-x", "-n", "0", "-k", OTHERS]
    process = run_python("-m", "pytest", *options, *files, **{jit.VARIABLE: "1"})
    assert int(re.search(r"(\d+) passed", process.stdout)[1]) > 300
