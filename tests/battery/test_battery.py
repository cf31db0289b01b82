"""The battery: the real permutation and the oracles pass, every control is caught."""

from __future__ import annotations

import pytest

from gpusampler.permutation import _native
from gpusampler.permutation import host as permutation_host
from gpusampler.permutation.reference import Streams, derive_key
from gpusampler.plan import epoch_plan
from gpusampler.plan.evaluators import host

from . import bijectivity, statistics
from .cases import CASES, below, run
from .controls import CONTROLS, LARGEST_FOR_ORACLES, ORACLES, Control
from .statistics import Result
from .subjects import HashModulo, Subject
from .through_plan import through_plan


def flat(parts) -> list[Result]:
    return [result for part in parts for result in part]


def told(results: list[Result]) -> str:
    return "\n".join(f"{r.test}, n={r.n}: p={r.p:.3g}, {r.z:.1f} sd" for r in results)


@pytest.fixture(scope="module")
def quick() -> list[Result]:
    return flat(run(Subject(), "quick"))


@pytest.mark.expensive("the statistics of the permutation")
def test_passes(quick):
    failed = statistics.failures(quick, statistics.bound(quick))
    assert not failed, told(failed)


def test_every_test_ran(quick):
    for case in CASES:
        for name in case.yields if case.quick else ():
            assert any(r.n == case.n and r.test.startswith(name) for r in quick), (name, case.n)


@pytest.mark.parametrize(
    "control",
    [
        pytest.param(
            control,
            id=control.subject.name,
            marks=pytest.mark.slow("the statistics of sixteen permutations that are wrong")
            if control.form == "quick"
            else pytest.mark.battery("a hash that fails only with many samples"),
        )
        for control in CONTROLS
    ],
)
def test_control_is_caught(control: Control, quick):
    results = flat(run(control.subject, control.form, control.decisive_cases()))
    failed = statistics.failures(results, statistics.bound(quick))
    assert control.missed(failed) == []


def test_every_kind_of_test_catches_a_control():
    caught = {name.partition(":")[0] for control in CONTROLS for name in control.caught_by}
    kinds = {name.partition(":")[0] for case in CASES for name in case.yields}
    # The plan's own control is the next test.
    assert kinds - caught == {"plan"}


@pytest.mark.slow("the statistics once more")
def test_plan_that_adds_seed_and_epoch_is_caught(monkeypatch, quick):
    class Unmixed:
        """Streams that still say what their seed is."""

        @staticmethod
        def of(seed):
            return Streams((seed, 1), (seed, 2), (seed, 3), (seed, 6))

    def added(stream, pass_, group):
        seed, purpose = stream
        return derive_key(seed + pass_, purpose, 0, group)

    monkeypatch.setattr(epoch_plan, "Streams", Unmixed)
    # The compiled module derives keys itself.
    monkeypatch.setattr(_native, "module", None)
    for module in (host, permutation_host):
        monkeypatch.setattr(module, "key_of", added)
    failed = statistics.failures(through_plan(2_000), statistics.bound(quick))
    names = {result.test for result in failed}
    for form in ("interleaved", "in a row"):
        for what in ("order", "samples"):
            assert f"plan: {what}, s,e+1 | s+1,e, {form}" in names


@pytest.mark.parametrize("oracle", ORACLES, ids=lambda oracle: oracle.name)
@pytest.mark.slow("the statistics of permutations that are not ours")
def test_oracle_passes(oracle, quick):
    results = flat(run(oracle(), "quick", below(LARGEST_FOR_ORACLES)))
    failed = statistics.failures(results, statistics.bound(quick))
    assert not failed, told(failed)


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_bijective_up_to_4096(seed):
    assert bijectivity.exhaustive(seed) == []


@pytest.mark.parametrize("n", bijectivity.large_sizes(300_000))
def test_bijective_around_squares_and_powers_of_two(n):
    assert bijectivity.is_bijection(Subject(), n, seed=n)


def test_hash_modulo_is_no_bijection():
    found = [n for n in (33, 64, 1000) if bijectivity.is_bijection(HashModulo(), n, 0)]
    assert found == []


@pytest.mark.battery("the long form of the statistics")
def test_passes_long():
    results = flat(run(Subject(), "long"))
    failed = statistics.failures(results, statistics.bound(results))
    assert not failed, told(failed)


@pytest.mark.parametrize("n", [n for n in bijectivity.large_sizes(10**7) if n > 300_000])
@pytest.mark.battery("every position of large permutations")
def test_bijective_up_to_ten_million(n):
    assert bijectivity.is_bijection(Subject(), n, seed=n)
