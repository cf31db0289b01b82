"""Mutated states are refused and change nothing, or the sampler goes on where they say."""

from __future__ import annotations

import pytest

from support.processes import run_fuzzer


def test_a_few_thousand_states():
    run_fuzzer("fuzz_states", 3000, 1)


@pytest.mark.battery("a million mutated states")
@pytest.mark.parametrize("seed", range(10))
def test_a_million_states(seed):
    run_fuzzer("fuzz_states", 100_000, 1000 + seed)
